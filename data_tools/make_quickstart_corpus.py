"""Build a small corpus from text that is on every machine with Python.

    python data_tools/make_quickstart_corpus.py --output_dir output/quickstart/data/corpus

Writes the schemas of the real sources: `pretrain/*.parquet` with the columns text, score, source
(as FineWeb-Edu-Chinese) and `sft/sft_data_en.jsonl` (as DeepCtrl). The same Python gives the same
bytes.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# The tools run as plain scripts from the repository, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_llm.command_line import HelpFormatter, Parser

PYTHON_SOURCE = "python-source"
PYTHON_DOCSTRINGS = "python-docstrings"
MANPAGES_ZH = "manpages-zh"

SKIPPED_DIRECTORIES = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo",
    "encodings", "lib2to3", "ensurepip", "lib-dynload",
}  # fmt: skip
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
# Tables rather than text, or a document in another form.
SKIPPED_MODULES = {"pydoc_data.topics", "stringprep", "this"}

MIN_CHARACTERS = 80
MAX_CHARACTERS = 6000
DEFAULT_MAX_BYTES = 8_000_000
SHARD_BYTES = 2_000_000
HELP_TOPICS = Path("pydoc_data", "topics.py")
MAN_DIRECTORY = Path("/usr/share/man/zh_CN")


@dataclass(frozen=True)
class Document:
    """A text and the name of the source it comes from."""

    text: str
    source: str


@dataclass(frozen=True)
class Module:
    """A module of the standard library: dotted name, source and its syntax tree."""

    name: str
    source: str
    tree: ast.Module


@dataclass(frozen=True)
class Described:
    """A public function or class: dotted name, signature (may be empty) and docstring."""

    name: str
    kind: str
    signature: str
    docstring: str


def main() -> None:
    """Command-line entry."""
    arguments = parse_arguments()
    try:
        build_corpus(
            arguments.output_dir, arguments.max_bytes, arguments.stdlib_dir, arguments.man_dir
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, sys.argv when none is given."""
    parser = Parser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--max_bytes",
        type=int,
        default=DEFAULT_MAX_BYTES,
        help="UTF-8 bytes of pretraining text to keep; the small sources come first",
    )
    parser.add_argument(
        "--stdlib_dir",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of the standard library's sources",
    )
    parser.add_argument(
        "--man_dir", type=Path, default=MAN_DIRECTORY, help="folder of Chinese manual pages"
    )
    return parser.parse_args(command_line)


def build_corpus(output_dir: Path, max_bytes: int, stdlib_dir: Path, man_dir: Path) -> None:
    """Write `output_dir`/pretrain and `output_dir`/sft; ValueError when there is no text."""
    modules = list(stdlib_modules(stdlib_dir))
    if not modules:
        raise ValueError(
            f"--stdlib_dir: {stdlib_dir} holds no Python sources to make a corpus of; give the "
            "folder of a Python installation that has its .py files"
        )
    sources = [
        (MANPAGES_ZH, manual_pages(man_dir)),
        (PYTHON_DOCSTRINGS, docstring_documents(modules, stdlib_dir / HELP_TOPICS)),
        (PYTHON_SOURCE, source_documents(modules)),
    ]
    documents = select_documents(sources, max_bytes)
    write_shards(documents, output_dir / "pretrain")
    conversations = write_conversations(
        described_objects(modules), output_dir / "sft" / "sft_data_en.jsonl"
    )
    for name, _ in sources:
        texts = [document.text for document in documents if document.source == name]
        size = sum(len(text.encode()) for text in texts)
        print(f"{name}: {len(texts)} documents, {size / 1e6:.2f} MB")
    print(f"sft: {conversations} conversations")


def select_documents(
    sources: Iterable[tuple[str, Iterable[str]]], max_bytes: int
) -> list[Document]:
    """Take texts source by source until `max_bytes` are reached, without exact duplicates.

    Inside a source and in the result the order is that of the texts' SHA-256: a shuffle, and a
    fair sample where the limit cuts, that need no random state.
    """
    seen: set[bytes] = set()
    kept: list[tuple[bytes, Document]] = []
    size = 0
    for name, texts in sources:
        for digest, text in sorted({hashlib.sha256(t.encode()).digest(): t for t in texts}.items()):
            text_bytes = len(text.encode())
            if digest in seen or size + text_bytes > max_bytes:
                continue
            seen.add(digest)
            size += text_bytes
            kept.append((digest, Document(text, name)))
    return [document for _, document in sorted(kept, key=lambda item: item[0])]


def quality_score(text: str) -> float:
    """Return 0.5 + 0.5 × (distinct words ÷ words), in 0.5 … 1: repetitive text scores low.

    It stands in for FineWeb-Edu's classifier score; Chinese characters count as words.
    """
    words = re.findall(r"[一-鿿]|[^\W_]+", text.lower())
    return round(0.5 + 0.5 * len(set(words)) / len(words), 4) if words else 0.5


def write_shards(documents: list[Document], folder: Path) -> None:
    """Write parquet shards of about SHARD_BYTES of text: text, score, source."""
    shards: list[list[Document]] = [[]]
    size = 0
    for document in documents:
        if size >= SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(document)
        size += len(document.text.encode())
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.parquet"):
        leftover.unlink()
    for index, shard in enumerate(shards):
        table = pa.table(
            {
                "text": pa.array([document.text for document in shard], pa.string()),
                "score": pa.array([quality_score(d.text) for d in shard], pa.float64()),
                "source": pa.array([document.source for document in shard], pa.string()),
            }
        )
        pq.write_table(table, folder / f"{index:06d}.parquet", compression="zstd")


# Python sources


def stdlib_modules(stdlib_dir: Path) -> Iterator[Module]:
    """Yield the modules that are plain source files, in the order of their paths."""
    for directory, subdirectories, files in os.walk(stdlib_dir):
        subdirectories[:] = sorted(
            name
            for name in subdirectories
            if name not in SKIPPED_DIRECTORIES and not name.startswith(SKIPPED_PREFIXES)
        )
        for file in sorted(files):
            if not file.endswith(".py") or file.startswith(SKIPPED_PREFIXES):
                continue
            path = Path(directory) / file
            parts = path.relative_to(stdlib_dir).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not name or name in SKIPPED_MODULES:
                continue
            try:
                source = path.read_text(encoding="utf-8")
                tree = ast.parse(source)
            except (UnicodeDecodeError, SyntaxError):
                # The library has a few files in other encodings, and templates.
                continue
            yield Module(name, source, tree)


def source_documents(modules: Iterable[Module]) -> Iterator[str]:
    """Yield top-level functions and classes; a long class is given method by method."""
    for module in modules:
        # Not str.splitlines(), which also splits at form feeds that ast does not count as lines.
        lines = io.StringIO(module.source).readlines()
        for node in module.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                for text in _pieces_of(node, lines):
                    if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
                        yield text


def _pieces_of(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str]
) -> Iterator[str]:
    text = _source_of(node, lines)
    if len(text) <= MAX_CHARACTERS or not isinstance(node, ast.ClassDef):
        yield text
        return
    methods = [m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)]
    if not methods:
        return
    header = "".join(lines[node.lineno - 1 : _first_line(methods[0]) - 1]).rstrip()
    yield header + "\n"
    for method in methods:
        yield f"{lines[node.lineno - 1].rstrip()}\n{_source_of(method, lines)}"


def _source_of(node: ast.AST, lines: list[str]) -> str:
    return "".join(lines[_first_line(node) - 1 : node.end_lineno]).rstrip() + "\n"  # type: ignore[attr-defined]


def _first_line(node: ast.AST) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])  # type: ignore[attr-defined]


# Docstrings


def docstring_documents(modules: Iterable[Module], help_topics: Path) -> Iterator[str]:
    """Yield prose that no source document holds: module docstrings, built-ins, help topics."""
    for module in modules:
        docstring = ast.get_docstring(module.tree)
        if docstring:
            yield from _paragraph_groups(f"{module.name}\n\n{docstring}\n")
    for name in sorted(sys.builtin_module_names):
        if not name.startswith("_") or name in {"_io", "_collections", "_thread"}:
            yield from _builtin_docstrings(name)
    if help_topics.is_file():
        for topic in _dictionary_of_strings(help_topics.read_text(encoding="utf-8")):
            yield from _paragraph_groups(topic)


def _builtin_docstrings(module_name: str) -> Iterator[str]:
    """Yield the docstrings of a module written in C, which has no source to read them from."""
    module = importlib.import_module(module_name)
    for name, value in sorted(vars(module).items()):
        members = [(f"{module_name}.{name}", value)]
        if inspect.isclass(value) and value.__module__ == module_name:
            members += [(f"{module_name}.{name}.{k}", v) for k, v in sorted(vars(value).items())]
        for full_name, member in members:
            docstring = getattr(member, "__doc__", None)
            is_code = inspect.isclass(member) or inspect.isroutine(member)
            if is_code and isinstance(docstring, str):
                text = f"{full_name}\n\n{inspect.cleandoc(docstring)}\n"
                if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
                    yield text


def _dictionary_of_strings(source: str) -> list[str]:
    """Return the values of the one dictionary of a module, without running it."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return [v for v in ast.literal_eval(node.value).values() if isinstance(v, str)]
    return []


def _paragraph_groups(text: str) -> Iterator[str]:
    """Yield a text in runs of paragraphs of natural size."""
    group = ""
    for paragraph in re.split(r"\n{2,}", text.strip()):
        if group and len(group) + len(paragraph) > MAX_CHARACTERS // 2:
            yield group
            group = ""
        group += ("\n\n" if group else "") + paragraph
    if len(group) >= MIN_CHARACTERS:
        yield group + "\n"


def described_objects(modules: Iterable[Module]) -> Iterator[Described]:
    """Yield the public functions, classes and methods that have a docstring."""
    for module in modules:
        if any(part.startswith("_") for part in module.name.split(".")):
            continue
        for node in module.tree.body:
            yield from _described(node, module.name)
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for member in node.body:
                    yield from _described(member, f"{module.name}.{node.name}", inside_class=True)


def _described(node: ast.stmt, prefix: str, inside_class: bool = False) -> Iterator[Described]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    docstring = ast.get_docstring(node)
    if node.name.startswith("_") or not docstring:
        return
    name = f"{prefix}.{node.name}"
    if isinstance(node, ast.ClassDef):
        yield Described(name, "class", "", docstring)
    else:
        kind = "method" if inside_class else "function"
        yield Described(name, kind, f"{node.name}({ast.unparse(node.args)})", docstring)


# Conversations


def write_conversations(described: Iterable[Described], path: Path) -> int:
    """Write DeepCtrl-shaped jsonl, one conversation per object, and return how many there are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[tuple[str, str]] = set()
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for item in described:
            answer = _first_paragraph(item.docstring)
            if len(answer) < 20 or (item.name, answer) in seen:
                continue
            seen.add((item.name, answer))
            record = conversation(len(seen) - 1, item, answer)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return len(seen)


def conversation(index: int, item: Described, answer: str) -> dict[str, object]:
    """Return one record; its shape is chosen by a hash of the name, so that all shapes occur."""
    shape = hashlib.sha256(item.name.encode()).digest()[0] % 4
    history: list[list[str]] = []
    # As in DeepCtrl the question is usually the input, and the instruction empty.
    instruction, question = "", f"What does {item.name} do?"
    if item.kind == "class":
        question = f"What is {item.name}?"
    if shape == 0 and item.signature:
        history = [[f"How is {item.name} called?", f"`{item.signature}`"]]
        question = "And what does it do?"
    elif shape == 1:
        instruction, question = f"Describe the {item.kind} of the Python library.", item.name
    return {
        "id": index,
        "instruction": instruction,
        "input": question,
        "output": answer,
        "history": history,
        "language": "en",
        "data_source": PYTHON_DOCSTRINGS,
        "input_len": len(instruction) + len(question),
        "output_len": len(answer),
        "num_utter": len(history) + 1,
        "type": ["function", "method", "class"].index(item.kind),
        "type_keyword": [item.kind, item.name.split(".")[0]],
    }


def _first_paragraph(docstring: str) -> str:
    return " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())


# Manual pages


def manual_pages(man_dir: Path) -> Iterator[str]:
    """Yield the manual pages below a folder as plain text; nothing when it does not exist."""
    for path in sorted(man_dir.rglob("*.gz")):
        try:
            roff = gzip.decompress(path.read_bytes()).decode()
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            # A link to a page that was not installed, a damaged page, or an old one in GB18030.
            print(f"{path} is left out: {error}")
            continue
        text = roff_to_text(roff)
        if len(text) >= MIN_CHARACTERS:
            yield from _paragraph_groups(text)


ROFF_ESCAPES = [
    (r"\\f(\[[^\]]*\]|\(..|.)", ""),  # fonts
    (r"\\s[-+]?\d", ""),  # sizes
    (r"\\\*\(lq|\\\*\(rq|\\\(lq|\\\(rq|\\\(dq", '"'),
    (r"\\\(aq|\\\(cq|\\\(oq", "'"),
    (r"\\\((?:em|en)", "-"),
    (r"\\\(bu", "*"),
    (r"\\\(co", "(C)"),
    (r"\\\(..|\\\[[^\]]*\]|\\\*\(..|\\\*.", ""),  # other named characters and strings
    (r"\\[&|^/,:%cpz]", ""),  # spacing marks without width
    (r"\\[ ~0]", " "),
    (r"\\-", "-"),
    (r"\\e", r"\\"),
]
PARAGRAPH_REQUESTS = {"PP", "P", "LP", "TP", "IP", "HP", "sp", "RS", "RE", "TQ", "Pp", "It"}
TEXT_REQUESTS = {
    "B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB",
    "Nm", "Nd", "Ar", "Fl", "Op", "Xr", "Em", "Sy", "Pa",
}  # fmt: skip


def roff_to_text(roff: str) -> str:
    """Render the common requests of a manual page as plain paragraphs."""
    paragraphs: list[list[str]] = [[]]
    for line in roff.splitlines():
        if line.startswith(('.\\"', "'\\\"", '\\"')):
            continue
        if not line.startswith((".", "'")):
            paragraphs[-1].append(_without_escapes(line))
            continue
        request, _, rest = line[1:].strip().partition(" ")
        if request in {"SH", "SS", "Sh", "Ss"}:
            paragraphs += [[_without_escapes(" ".join(_arguments(rest)))], []]
        elif request in PARAGRAPH_REQUESTS:
            paragraphs.append(_arguments(_without_escapes(rest))[:1] if request == "IP" else [])
        elif request in TEXT_REQUESTS:
            separator = "" if len(request) == 2 and request.isupper() else " "
            paragraphs[-1].append(_without_escapes(separator.join(_arguments(rest))))
    # Lines of a paragraph are joined as roff joins them: with a space, which Chinese text on
    # both sides of the break does not want.
    texts = ("\n".join(line for line in lines if line.strip()) for lines in paragraphs)
    joined = (re.sub(r"(?<=[^\x00-\x7f])\n(?=[^\x00-\x7f])", "", text) for text in texts)
    return "\n\n".join(text.replace("\n", " ").strip() for text in joined if text.strip()) + "\n"


def _arguments(text: str) -> list[str]:
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', text)]


def _without_escapes(text: str) -> str:
    for pattern, replacement in ROFF_ESCAPES:
        text = re.sub(pattern, replacement, text)
    return text


if __name__ == "__main__":
    main()
