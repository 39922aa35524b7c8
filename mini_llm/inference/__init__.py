"""Using a trained model: the Generator, ``launch.sh generate`` and ``launch.sh chat``.

Nothing is imported here, so that ``--help`` need not wait for torch.
"""
