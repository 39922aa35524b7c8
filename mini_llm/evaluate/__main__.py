"""``python -m mini_llm.evaluate CKPT``: see ``--help``."""

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_llm.command_line import UsageError

from ..inference.ends import is_chat_model
from .arguments import MAX_EVAL_ROWS, Flags, parse_flags
from .checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    longest_input,
    manifest_of,
    weights_fingerprint,
)
from .results import (
    FOLDER,
    RESULTS,
    Results,
    as_text,
    bucket_table,
    held_out_table,
    results_folder,
    tasks_table,
)

LONGEST_ROW = 2048  # where neither flags, run nor data say how long
PACKAGES = ("torch", "transformers", "lm_eval", "datasets")
SFT_MANIFEST = "format"  # a field that manifests of conversations have


@dataclass(frozen=True)
class HeldOutText:
    """Rows to measure, the bytes of a token where the rows do not say them, and their length."""

    rows: Any  # source -> HeldOut
    token_bytes: Any
    seq_len: int
    origin: str  # the run's data, --data or --text


def main(command_line: Sequence[str] | None = None) -> int:
    """Command-line entry; returns the exit status, 2 after one sentence about a mistake."""
    try:
        flags = parse_flags(command_line)
        write(*evaluate(flags))
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def evaluate(flags: Flags) -> tuple[Results, Path, Checkpoint]:
    """Check everything, then measure; returns what was found and where it is to be written.

    Raises UsageError, or OSError of a disk, in one sentence.
    """
    # ---- Check: whatever can be wrong is found before the model is loaded ------------------------
    start = time.monotonic()
    checkpoint = find_checkpoint(flags.checkpoint)
    folder = output_folder(flags, checkpoint)
    from mini_llm.device import choose_device
    from mini_llm.parallel.environment import prepare_environment

    prepare_environment()
    try:
        device = choose_device(flags.device)
    except ValueError as error:
        raise UsageError(str(error)) from None
    config = load_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    if flags.apply_chat_template and not tokenizer.chat_template:
        raise UsageError(
            f"--apply_chat_template true: the tokenizer of {checkpoint.where} has no chat template"
        )
    text, left_out = None, []
    if flags.skip == "held_out":
        left_out.append("held-out text is left out: --skip held_out")
    else:
        text = open_text(flags, checkpoint, config, tokenizer)
        if text is None:
            left_out.append(
                f"held-out text is left out: {checkpoint.where} belongs to no run; give --data or "
                "--text"
            )
    prepared = None
    if flags.skip == "tasks":
        left_out.append("lm-eval's tasks are left out: --skip tasks")
    else:
        prepared, sentences = prepare_tasks(flags)
        left_out += sentences
    if text is None and prepared is None:
        raise UsageError(f"there is nothing to evaluate: {'; '.join(left_out)}")
    for sentence in left_out:
        print(sentence, flush=True)
    folder.mkdir(parents=True, exist_ok=True)

    # ---- Model: this project's class where it has one --------------------------------------------
    model = load_model(checkpoint, config, device=device, dtype=flags.dtype)
    uses_template = flags.apply_chat_template
    if uses_template is None:
        uses_template = is_chat_model(tokenizer, model.generation_config)
    results: Results = {
        "checkpoint": checkpoint.name,
        "step": checkpoint.last_step,
        "weights": weights_fingerprint(checkpoint, config),
        "model_class": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "held_out": {},
        "tasks": {},
        "left_out": left_out,
        "seed": flags.seed,
        "batch_size": flags.batch_size,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    print(describe(results), flush=True)

    # ---- Held-out text, then tasks ---------------------------------------------------------------
    if text is not None:
        from .held_out import evaluate_held_out

        results["held_out"] = evaluate_held_out(
            model,
            text.rows,
            batch_size=flags.batch_size,
            device=device,
            token_bytes=text.token_bytes,
        )
        results["held_out_from"], results["seq_len"] = text.origin, text.seq_len
        if not results["held_out"]:
            raise UsageError(f"{text.origin} has no held-out token to predict; give --text")
        print_held_out(results)
    if prepared is not None:
        from . import harness

        results["apply_chat_template"] = uses_template
        results["limit"] = flags.limit
        results["tasks"] = harness.ask(
            prepared,
            model,
            tokenizer,
            num_fewshot=flags.num_fewshot,
            limit=flags.limit,
            apply_chat_template=uses_template,
            batch_size=flags.batch_size,
            seed=flags.seed,
        )
        asked = " through the chat template" if uses_template else ""
        print(f"\nTasks{asked}\n{as_text(tasks_table(results))}", flush=True)
    results["seconds"] = round(time.monotonic() - start, 1)
    return results, folder, checkpoint


def output_folder(flags: Flags, checkpoint: Checkpoint) -> Path:
    """Where results.json goes."""
    if flags.output_dir is not None:
        return flags.output_dir
    if checkpoint.run is not None:
        return results_folder(checkpoint.run, checkpoint.step)
    name = checkpoint.where if not Path(checkpoint.where).exists() else Path(checkpoint.where).name
    return Path("output") / FOLDER / (name.replace("/", "--") or "model")


def open_text(
    flags: Flags, checkpoint: Checkpoint, config: Any, tokenizer: Any
) -> HeldOutText | None:
    """The held-out rows that were asked for: --text, --data, or those of the run; else None.

    Raises UsageError where they do not fit the checkpoint or cannot be had.
    """
    run = checkpoint.run_config
    max_rows = flags.max_eval_rows
    if max_rows is None:
        max_rows = run.get("max_eval_rows", MAX_EVAL_ROWS)
    data = flags.data or run.get("data")
    manifests = {name: _manifest(source) for name, source in (data or {}).items()}
    longest = longest_input(config)
    of_data = next((m["seq_len"] for m in manifests.values() if "seq_len" in m), None)
    seq_len = flags.seq_len or (None if flags.data else run.get("seq_len"))
    seq_len = seq_len or (None if flags.text else of_data)
    seq_len = int(seq_len or min(longest or LONGEST_ROW, LONGEST_ROW))
    if longest is not None and seq_len > longest:
        raise UsageError(
            f"--seq_len {seq_len} is more than the {longest} tokens that {checkpoint.where} was "
            f"made for; give --seq_len {longest} or less"
        )
    if flags.text:
        from .texts import read_texts

        texts = read_texts(flags.text, tokenizer, seq_len=seq_len, max_rows=max_rows or None)
        for name, reasons in texts.rejected.items():
            if reasons:
                told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
                print(f"{name}: left out {told}", flush=True)
        return HeldOutText(texts.held_out, None, seq_len, "--text")
    if not data:
        return None

    from mini_llm.data.sft_stream import open_sft_validation
    from mini_llm.data.stream import open_validation
    from mini_llm.data.tokenizer import token_byte_lengths

    origin = "--data" if flags.data else f"the data of {checkpoint.run}"
    tokenizer_folder = _tokenizer_folder(checkpoint, origin)
    _check_tokenizer(checkpoint, tokenizer_folder, manifests)
    of_conversations = checkpoint.is_fine_tuned
    if any(manifests.values()):
        of_conversations = any(SFT_MANIFEST in manifest for manifest in manifests.values())
    open_rows = open_sft_validation if of_conversations else open_validation
    try:
        rows = open_rows(
            data, seq_len=seq_len, max_rows=max_rows or None, tokenizer=str(tokenizer_folder)
        )
        token_bytes = token_byte_lengths(tokenizer)
    except (ValueError, OSError) as error:
        instead = "" if flags.data else f" (config.yaml of {checkpoint.run} names it)"
        raise UsageError(
            f"{' '.join(str(error).split())}{instead}; or give other --data, --text or --skip "
            "held_out"
        ) from None
    return HeldOutText(rows, token_bytes, seq_len, origin)


def _manifest(source: Any) -> dict[str, Any]:
    return manifest_of(source.get("path")) if isinstance(source, dict) else {}


def _tokenizer_folder(checkpoint: Checkpoint, origin: str) -> Path:
    """The folder of the checkpoint's tokenizer.json."""
    folder = Path(checkpoint.where)
    if not folder.is_dir():
        from transformers.utils import cached_file

        found = cached_file(checkpoint.where, "tokenizer.json")
        folder = Path(found).parent if found else folder
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(
            f"{checkpoint.where} has no tokenizer.json, so the rows of {origin} cannot be matched "
            "with it; give --text"
        )
    return folder


def _check_tokenizer(
    checkpoint: Checkpoint, folder: Path, manifests: dict[str, dict[str, Any]]
) -> None:
    """Refuse rows packed with another tokenizer: their ids would be other text."""
    from mini_llm.data.tokenizer import tokenizer_fingerprint

    mine = tokenizer_fingerprint(folder)
    for name, manifest in manifests.items():
        tokenizer = manifest.get("tokenizer")
        theirs = tokenizer.get("fingerprint") if isinstance(tokenizer, dict) else None
        if theirs is not None and theirs != mine:
            raise UsageError(
                f"--data: the rows of '{name}' were packed with another tokenizer (fingerprint "
                f"{theirs[:12]}) than that of {checkpoint.where} ({mine[:12]}); give the text "
                "itself, which the checkpoint's own tokenizer takes: --text FILE"
            )


def prepare_tasks(flags: Flags) -> tuple[Any, list[str]]:
    """lm-eval's tasks, or None where it is not installed and was not asked for; what is left out.

    Raises UsageError where it was asked for.
    """
    from . import harness

    if not harness.is_installed():
        sentence = f"lm-eval is not installed: {harness.EXTRA}"
        if flags.tasks or flags.eval_data:
            raise UsageError(f"{'--tasks' if flags.tasks else '--eval_data'}: {sentence}")
        return None, [f"the tasks are left out: {sentence}"]
    prepared = harness.prepare(flags.tasks, flags.eval_data)
    if flags.num_fewshot is not None:
        harness.check_examples(prepared, flags.num_fewshot)
    return prepared, prepared.left_out


def versions() -> dict[str, str]:
    """Versions of mini-llm and of the packages that decide over the figures."""
    from importlib.metadata import PackageNotFoundError, version

    from mini_llm import __version__

    found = {"mini_llm": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe(results: Results) -> str:
    """The checkpoint in a line."""
    step = "" if results["step"] is None else f", step {results['step']:,}"
    return (
        f"{results['checkpoint']}: {results['model_class']}, {results['parameters']:,} parameters, "
        f"{results['dtype']} on {results['device']}{step}"
    )


def print_held_out(results: Results) -> None:
    """The tables of the held-out part."""
    print(f"\nHeld-out text\n{as_text(held_out_table(results))}")
    for name, source in results["held_out"].items():
        by_length = bucket_table(source["by_length"], "document length")
        print(f"\n{name} by tokens of the document\n{as_text(by_length)}")
        by_position = bucket_table(source["by_position"], "position")
        print(f"\n{name} by position in the document\n{as_text(by_position)}")
    sys.stdout.flush()


def write(results: Results, folder: Path, checkpoint: Checkpoint) -> None:
    """results.json and the picture; the report and the card of the run, where they lie in it."""
    from mini_llm.training.run_folder import write_json

    from .plot import draw_by_length

    write_json(folder / RESULTS, finite(results))
    print(f"\nwrote {folder / RESULTS}", flush=True)
    if picture := draw_by_length(results, folder):
        print(f"drew {picture}", flush=True)
    run = checkpoint.run
    if run is None or folder != results_folder(run, checkpoint.step):
        return
    from mini_llm.hub.model_card import PICTURE, write_card
    from mini_llm.plots.report import write_report
    from mini_llm.plots.style import PLOTS

    def card() -> Path:
        drawn = run / PLOTS / PICTURE
        write_card(run / "final", run, picture=drawn if drawn.is_file() else None)
        return run / "final" / "README.md"

    shown = {"the report": lambda: write_report(run)}
    if checkpoint.step is None:
        shown["the model card"] = card
    for name, rewrite in shown.items():
        try:
            print(f"wrote {rewrite()}", flush=True)
        except ValueError as error:  # the run folder lacks what it is made of
            print(f"{name} stays as it is: {error}", flush=True)


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    if not sys.stderr.isatty():  # progress bars are thousands of lines in a log file
        os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
