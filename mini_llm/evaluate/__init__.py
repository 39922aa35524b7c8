"""``launch.sh evaluate CKPT``: held-out bits per byte, loss by document length, lm-eval's tasks.

A checkpoint (``checkpoint.py``) is measured on held-out text (``held_out.py``, ``texts.py``) and
asked multiple-choice questions through lm-eval (``harness.py``, ``tasks/``); what was found is
written to ``results.json`` (``results.py``), which reports and model cards show.
"""
