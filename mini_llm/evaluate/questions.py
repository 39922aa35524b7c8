"""Multiple-choice questions in files, as lm-eval's ``custom_dataset`` takes them.

Every cell stays the text that it is: an option 0.50 is not 0.5, and NA is an answer.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parent / "tasks"


def load(files: Mapping[str, str | Sequence[str]], **_: Any) -> dict[str, Any]:
    """The questions of each split: .jsonl, .csv or .parquet files, relative ones in ``tasks/``.

    lm-eval adds the task's metadata to the arguments, which nothing here needs.
    """
    from datasets import Dataset

    splits = {}
    for split, paths in files.items():
        listed = [paths] if isinstance(paths, str) else list(paths)
        questions = [question for path in listed for question in read(BUNDLED / path)]
        splits[split] = Dataset.from_list(questions)
    return splits


def read(path: Path) -> list[dict[str, str]]:
    """The questions of a file, each a mapping of its columns. Raises ValueError naming the file."""
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                records: list[Any] = list(csv.DictReader(file))
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            records = pq.read_table(path).to_pylist()
        else:
            # Not splitlines(): a JSON string may hold U+2028 and U+0085 as they are.
            lines = path.read_text(encoding="utf-8").split("\n")
            records = [json.loads(line) for line in lines if line.strip()]
        return [
            {key: "" if value is None else str(value) for key, value in record.items() if key}
            for record in records
        ]
    except (ValueError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} holds no questions ({reason}); get it again") from error
