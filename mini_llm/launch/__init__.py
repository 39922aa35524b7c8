"""Starting a recipe on one node or many: `python -m mini_llm.launch pretrain|sft|verify FLAGS`.

    options.py     the flags: the launcher's own, and those that are the recipe's
    nodes.py       how many nodes, which one this is, where the first one listens
    rendezvous.py  nodes that find each other through a file
    network.py     addresses and interfaces of this machine
    devices.py     processes and threads for this machine
    command.py     the exact `accelerate launch` and its environment
    supervise.py   runs it: signals, restarts, the exit status
    terminal.py    goes on without a terminal that was closed
    note.py        what a rank tells its launcher about the way it ended
    fan_out.py     a hostfile: the same on every host, by pdsh or ssh

It starts fast: the standard library and psutil, no torch.
"""
