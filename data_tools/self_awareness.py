"""What a model is taught to say of itself: questions from a YAML file, answers from it or a server.

`prepare_sft.py` draws from the questions; `self_awareness.yaml` is the file to edit.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mini_llm.data.conversations import ASSISTANT, SYSTEM, USER, Conversation

ENDPOINT_TRIES = 4
ENDPOINT_SECONDS = 120.0


@dataclass(frozen=True)
class Question:
    """A question with an answer of the file, and what an endpoint is told and must say."""

    question: str
    answer: str
    system: str
    must_say: tuple[str, ...]


@dataclass(frozen=True)
class SelfAwareness:
    """What the YAML file says, filled in; `sha256` is that of the file."""

    questions: list[Question]
    sha256: str

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> SelfAwareness:
        """Read --self_awareness_file; ValueError, naming file and entry, for what is not right."""
        path = arguments.self_awareness_file
        if not arguments.self_awareness:
            return cls([], "")
        if not path.is_file():
            raise FileNotFoundError(f"--self_awareness_file: {path} does not exist")
        content = path.read_bytes()
        try:
            described = yaml.safe_load(content)
            questions = list(_questions(described))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"--self_awareness_file: {path} is not YAML: {why}") from error
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"--self_awareness_file: {path} lacks or mistypes {error}; needed are facts, "
                "endpoint_system and topics with language, questions and answers, and every word "
                "in braces must be a fact of that language"
            ) from error
        return cls(questions, hashlib.sha256(content).hexdigest())


def _questions(described: dict[str, Any]) -> Iterator[Question]:
    for topic in described["topics"]:
        facts = described["facts"][topic["language"]]
        system = described["endpoint_system"][topic["language"]].format(**facts)
        must_say = tuple(str(facts[name]) for name in topic.get("must_say", []))
        for question in topic["questions"]:
            for answer in topic["answers"]:
                yield Question(question.format(**facts), answer.format(**facts), system, must_say)


def exchange(question: str, answer: str) -> Conversation:
    """Return a conversation of one question and answer."""
    return [{"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}]


def ask_endpoint(drawn: Sequence[Question], arguments: argparse.Namespace, path: Path) -> list[str]:
    """Return the endpoint's answer to each question.

    Each answer is kept in the file `path` as it comes, so that an interrupted run asks no question
    again.
    """
    known: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off when the run was
                continue
            known[record["request"]] = record["answer"]
    answers = []
    with path.open("ab") as kept:
        for place, question in enumerate(drawn):
            body = {
                "model": arguments.endpoint_model,
                "messages": [
                    {"role": SYSTEM, "content": question.system},
                    {"role": USER, "content": question.question},
                ],
                "seed": arguments.seed + place,
            }
            request = json.dumps([arguments.endpoint, body], ensure_ascii=False)
            if request not in known:
                known[request] = request_answer(arguments, body)
                record = {"request": request, "answer": known[request]}
                kept.write(b"\n" + json.dumps(record).encode() + b"\n")
                kept.flush()
            answers.append(known[request])
    return answers


def request_answer(arguments: argparse.Namespace, body: dict[str, Any]) -> str:
    """Ask an OpenAI-compatible endpoint; OSError or ValueError, naming the flag, if it fails."""
    url = arguments.endpoint.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(arguments.endpoint_key_variable):
        headers["Authorization"] = f"Bearer {secret}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for tries in range(1, ENDPOINT_TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=ENDPOINT_SECONDS) as response:
                content = response.read()
            break
        except urllib.error.HTTPError as error:
            if error.code not in (408, 429, 500, 502, 503, 504) or tries == ENDPOINT_TRIES:
                raise ValueError(
                    f"--endpoint: {url} answered {error.code} {error.reason}; check the URL, "
                    f"--endpoint_model and the key in {arguments.endpoint_key_variable}"
                ) from None
        except (OSError, http.client.HTTPException) as error:  # also an answer that breaks off
            if tries == ENDPOINT_TRIES:
                raise OSError(f"--endpoint: {url} cannot be reached ({error})") from None
        time.sleep(2 ** (tries - 1))
    try:
        answer = json.loads(content)["choices"][0]["message"]["content"]
        if not isinstance(answer, str):
            raise TypeError("content is no text")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"--endpoint: {url} gave no chat completion with choices[0].message.content ({error})"
        ) from error
    return answer.strip()
