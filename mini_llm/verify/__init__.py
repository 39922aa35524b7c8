"""`./launch.sh verify`: do this user's ranks and nodes train as one process does?

    arguments.py    its flags
    driver.py       on every node: one launch after the other, within the time; the table
    meeting.py      what the nodes' drivers tell each other meanwhile
    preflight.py    on every rank: versions, disk, compute, network
    pairs.py        which ranks are measured against each other
    judge.py        from measurements to rows of the table
    equivalence.py  tiny runs of the recipe under every engine, against one process
    table.py        the rows, in the terminal and in files

Every launch is an `accelerate launch` of its own, made by mini_llm/launch as those of a recipe are.
"""
