"""The recipes with a rank 1 that is given other flags and runs other code than rank 0.

``accelerate launch one_rank_differs.py RECIPE FLAGS_OF_RANK_1 flags…``: FLAGS_OF_RANK_1 is a JSON
list of flags that rank 1 alone has, at the end.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.training import run_folder
from mini_llm.training.arguments import PretrainArguments, SftArguments, parse_arguments
from recipes import pretrain, sft

if __name__ == "__main__":
    recipe, flags_of_rank_1, *flags = sys.argv[1:]
    if os.environ["RANK"] == "1":
        flags += json.loads(flags_of_rank_1)
        run_folder.code_version = lambda: "an older one"
    quickstart = f"recipes/configs/quickstart/{recipe}.yaml"
    if recipe == "sft":
        sft.main(parse_arguments(SftArguments, quickstart, flags))
    else:
        pretrain.main(parse_arguments(PretrainArguments, quickstart, flags))
