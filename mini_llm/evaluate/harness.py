"""Multiple choice through lm-eval's ``hf`` backend: this project's tasks, C-Eval, CMMLU, others.

A suite's ``_text`` variant asks the same questions without the four options in the prompt and
compares what the model says of each whole answer: letters mean little to a small model.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from mini_llm.command_line import UsageError

from . import questions

BUNDLED = ("mini_choice", "mini_choice_text")
TEXT = "_text"
EXTRA = "pip install -c mini_llm/constraints.txt -e '.[eval]'"
OPTIONS = ("A", "B", "C", "D")
BOOTSTRAPS = 1000  # of metrics whose standard error has no formula
FILE_SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Suite:
    """A Chinese benchmark as lm-eval has it: a group with one task a subject."""

    group: str
    folder: str  # of lm_eval/tasks, and in --eval_data
    hub_id: str
    splits: dict[str, str]  # lm-eval's name of the split of questions, and of solved examples
    question: str  # columns
    answer: str

    @property
    def names(self) -> tuple[str, str]:
        """Its two variants: by letter, and by the text of the answer."""
        return self.group, self.group + TEXT

    @property
    def how_to_get_it(self) -> str:
        """What a user does to have the data."""
        return (
            f"`hf download {self.hub_id} --repo-type dataset --local-dir DIR/{self.folder}`, unzip "
            "what is zipped, and give --eval_data DIR"
        )


SUITES = (
    Suite(
        group="ceval-valid",
        folder="ceval",
        hub_id="ceval/ceval-exam",
        splits={"questions": "val", "examples": "dev"},
        question="question",
        answer="answer",
    ),
    Suite(
        group="cmmlu",
        folder="cmmlu",
        hub_id="haonan-li/cmmlu",
        splits={"questions": "test", "examples": "dev"},
        question="Question",
        answer="Answer",
    ),
)


@dataclass(frozen=True)
class Prepared:
    """lm-eval's tasks and groups, loaded, and a sentence for each that was left out."""

    manager: Any
    tasks: list[Any]
    left_out: list[str]


def is_installed() -> bool:
    """Whether lm-eval is there."""
    return find_spec("lm_eval") is not None


def prepare(names: Sequence[str] | None, eval_data: Path | None) -> Prepared:
    """Load tasks by name; None: this project's, and the suites whose data are on this machine.

    Where a task's data cannot be had, a sentence says so; if nothing else is left, this project's
    are loaded. Raises UsageError for a name that nobody knows, and for files without questions.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = {suite.group: find_files(suite, eval_data) for suite in SUITES}
    left_out = []
    if names is None:
        names = list(BUNDLED)
        for suite in SUITES:
            if files[suite.group] or _is_cached(suite):
                names += suite.names
            else:
                where = f"not in {eval_data}, and not" if eval_data else "not"
                left_out.append(
                    f"{suite.group} is left out: its data are {where} in the cache of datasets; "
                    f"{suite.how_to_get_it}"
                )
    with TemporaryDirectory(prefix="mini_llm_tasks_") as folder:
        for suite in SUITES:
            if set(suite.names) & set(names):
                _write_tasks(suite, files[suite.group], Path(folder))
        manager = _manager_of(names, Path(folder))
        tasks: list[Any] = []
        for name in names:
            try:
                tasks += _load(manager, name)
            except (OSError, RuntimeError) as error:
                left_out.append(_no_data(name, error))
        if not tasks:
            left_out.append(f"{' and '.join(BUNDLED)} are asked instead")
            tasks = [task for name in BUNDLED for task in _load(manager, name)]
    try:
        manager.load(tasks)
    except ValueError as error:  # a task and a group that holds it
        raise UsageError(f"--tasks: {error}; name it once") from None
    return Prepared(manager, tasks, left_out)


def check_examples(prepared: Prepared, num_fewshot: int) -> None:
    """Raise UsageError for a task with fewer solved examples than are to be shown."""
    from lm_eval.api.samplers import FirstNSampler

    for item in prepared.tasks:
        for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
            sampler = getattr(task, "sampler", None)
            if sampler is None or task.get_config("num_fewshot") == 0:  # lm-eval shows none then
                continue
            # A sampler that draws them draws one more, for the question itself may be among them.
            there = len(sampler.df) - (not isinstance(sampler, FirstNSampler))
            if num_fewshot > there:
                raise UsageError(
                    f"--num_fewshot {num_fewshot}: {task.task_name} has only {max(there, 0)} "
                    "solved examples to show; give a smaller number"
                )


def _load(manager: Any, name: str) -> list[Any]:
    """The task or group of that name, or the tasks of that tag, with their questions."""
    try:
        loaded = manager.load([name])
    except ValueError as error:
        raise UsageError(f"--tasks {name}: {' '.join(str(error).split())}") from None
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _no_data(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    how = next((s.how_to_get_it for s in SUITES if name.startswith(s.group)), None)
    return f"{name} is left out: its data cannot be had ({reason}); " + (
        how or "go online once, or unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE"
    )


def _manager_of(names: Sequence[str], generated: Path) -> Any:
    """lm-eval's index of tasks that has all of these names. Raises UsageError for an unknown one.

    All of lm-eval's 14,000 tasks take seconds to read, so that happens only for one of them.
    """
    from lm_eval import tasks as of_lm_eval
    from lm_eval.tasks import TaskManager

    root = Path(of_lm_eval.__file__).parent
    ours = [str(questions.BUNDLED), str(generated)]
    few = [*(str(root / suite.folder) for suite in SUITES), *ours]
    manager = TaskManager(include_defaults=False, include_path=few)
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=ours)
    known = {*manager.all_tasks, *(name for suite in SUITES for name in suite.names)}
    for name in names:
        if name not in known:
            near = get_close_matches(name, sorted(known), n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else "; `lm-eval ls tasks` lists them"
            raise UsageError(f"--tasks {name} is no task that lm-eval or mini-llm has{hint}")
    return manager


# ---------------------------------------------------------------- C-Eval and CMMLU


def _is_cached(suite: Suite) -> bool:
    """Whether `datasets` has prepared the suite on this machine before."""
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / suite.hub_id.replace("/", "___")).is_dir()


def subjects(suite: Suite) -> dict[str, Path]:
    """The suite's subjects, each with the YAML of its task in lm-eval."""
    from lm_eval import tasks as of_lm_eval

    folder = Path(of_lm_eval.__file__).parent / suite.folder
    prefix = f"{suite.group}_"
    return {
        path.stem.removeprefix(prefix): path
        for path in sorted(folder.glob("*.yaml"))
        if path.stem.startswith(prefix)
    }


def find_files(suite: Suite, eval_data: Path | None) -> dict[str, dict[str, list[str]]]:
    """The suite's files below --eval_data: subject -> split -> paths; {} where there are none.

    Takes them as the authors' archives have them, ``val/law_val.csv`` and ``test/law.csv``, and as
    the hub does, ``law/ceval-exam-val.parquet`` and ``law/val-00000-of-00001.parquet``. Raises
    UsageError for other columns.
    """
    if eval_data is None:
        return {}
    inside = sorted(
        p for p in eval_data.iterdir() if p.is_dir() and p.name.startswith(suite.folder)
    )
    is_it = eval_data.resolve().name.startswith(suite.folder)
    roots = inside or ([eval_data] if is_it else [])
    by_place: dict[tuple[str, str], list[Path]] = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.suffix in FILE_SUFFIXES and path.is_file():
                parent, stem = path.parent.name, path.stem
                for split in suite.splits.values():
                    if parent == split:
                        subject = stem.removesuffix(f"_{split}")
                    elif split in stem.split("-"):
                        subject = parent
                    else:
                        continue
                    by_place.setdefault((subject, split), []).append(path.resolve())
    found: dict[str, dict[str, list[str]]] = {}
    for subject in subjects(suite):
        files = {split: by_place.get((subject, split), []) for split in suite.splits.values()}
        if files[suite.splits["questions"]]:
            _check_columns(suite, files[suite.splits["questions"]][0])
            found[subject] = {split: [str(p) for p in paths] for split, paths in files.items()}
    return found


def _check_columns(suite: Suite, path: Path) -> None:
    needed = {suite.question, *OPTIONS, suite.answer}
    try:
        asked = questions.read(path)
    except ValueError as error:
        raise UsageError(f"--eval_data: {error}") from None
    if not asked or not needed <= asked[0].keys():
        raise UsageError(
            f"--eval_data: {path} is no file of {suite.folder}: it lacks "
            f"{', '.join(sorted(needed - (asked[0].keys() if asked else set())))}"
        )


def _write_tasks(
    suite: Suite, files: Mapping[str, Mapping[str, Sequence[str]]], folder: Path
) -> None:
    """Write the suite's tasks in lm-eval's format: those on local files, and the _text variants."""
    of_subject = subjects(suite)
    chosen = [subject for subject in of_subject if not files or subject in files]
    for group, is_text in zip(suite.names, (False, True), strict=True):
        names = []
        for subject in chosen:
            name = f"{suite.group}_{subject}{TEXT if is_text else ''}"
            task: dict[str, Any] = {"include": str(of_subject[subject]), "task": name}
            if is_text:
                task |= {
                    "description": "",
                    "doc_to_text": "问题：{{" + suite.question + ".strip()}}\n答案：",
                    "doc_to_choice": "{{[A, B, C, D]}}",
                    "target_delimiter": "",
                }
            if files:
                task["dataset_kwargs"] = {"files": {k: list(v) for k, v in files[subject].items()}}
            text = yaml.safe_dump(task, allow_unicode=True)
            if files:
                text += "custom_dataset: !function mini_llm.evaluate.questions.load\n"
            if files or is_text:  # else it is lm-eval's own
                (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
            names.append(name)
        metrics = [
            {"metric": metric, "aggregation": "mean", "weight_by_size": True}
            for metric in ("acc", "acc_norm")
        ]
        content = {"group": group, "task": names, "aggregate_metric_list": metrics}
        (folder / f"_{group}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


# ---------------------------------------------------------------- asking


class _Truncations(logging.Handler):
    """Counts the prompts that lm-eval says it cut."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "Truncating" in record.getMessage()


def ask(
    prepared: Prepared,
    model: Any,
    tokenizer: Any,
    *,
    num_fewshot: int | None,
    limit: int | None,
    apply_chat_template: bool,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """By group and task: ``metrics`` (value and stderr by name), questions, version, examples.

    ``batch_size`` answers go through the model at a time. Says it where prompts were longer than
    the model's longest input, and lost their beginning.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Backend(HFLM):
        """lm-eval's hf backend, with its progress bars on a terminal alone."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    backend = logging.getLogger("lm_eval.models.huggingface")
    truncations = _Truncations()
    backend.addHandler(truncations)
    backend.setLevel(logging.WARNING)
    propagates, backend.propagate = backend.propagate, False
    try:
        results: Any = simple_evaluate(
            Backend(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=prepared.tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
            task_manager=prepared.manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    finally:
        backend.removeHandler(truncations)
        backend.propagate = propagates
    if truncations.count:
        print(
            f"{truncations.count:,} prompts were longer than the model's longest input and lost "
            "their beginning; give a smaller --num_fewshot",
            flush=True,
        )
    return _tidy(results)


def _tidy(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's results without what only it needs, each group before its tasks."""
    samples = results["n-samples"]
    members = {name: list(of) for name, of in results["group_subtasks"].items() if of}
    found_of = {**results.get("groups", {}), **results["results"]}
    order = [name for group, of in members.items() for name in (group, *of) if name in found_of]
    tidy: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([*order, *found_of]):
        found = found_of[name]
        metrics = {}
        for key, value in found.items():
            metric, comma, chosen_by = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = found.get(f"{metric}_stderr,{chosen_by}")
            label = metric if chosen_by == "none" else f"{metric} ({chosen_by})"
            metrics[label] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            }
        of_tasks = [task for task in members.get(name, [name]) if task in samples]
        tidy[name] = {
            "metrics": metrics,
            "questions": sum(samples[task]["effective"] for task in of_tasks),
            "num_fewshot": results["n-shot"].get(name),
            "version": str(results["versions"].get(name, "")),
        }
        if name in members:
            tidy[name]["members"] = members[name]
    return tidy
