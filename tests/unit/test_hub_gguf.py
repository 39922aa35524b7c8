"""A model exported to GGUF is, to llama.cpp, the model that was trained."""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mini_llm import build_model, load_model
from mini_llm.data.tokenizer import DEFAULT_TOKENIZER, load_tokenizer
from mini_llm.hub.__main__ import main
from mini_llm.hub.export import base_generation_config, chat_generation_config
from mini_llm.hub.gguf import export_gguf, template_for_llama_cpp
from tests.llama_cpp import ask
from tests.unit.prepare_fixtures import make_tokenizer

PROMPT = [5, 6, 300, 17, 300, 17, 42, 99]
NEW_TOKENS = 24
OVERRIDES: dict[str, dict[str, Any]] = {
    "mini_llama3_tiny": {},
    "mini_deepseekv3_tiny": {},
    "mini_qwen3_next_tiny": {},
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("gguf") / "tokenizer")


def save_model(
    name: str, folder: Path, tokenizer_dir: Path, *, chat: bool = False, **overrides: Any
) -> Path:
    """A checkpoint whose every weight matters: none is as the initialisation leaves it."""
    tokenizer: Any = load_tokenizer(tokenizer_dir)
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = build_model(
        name, vocab_size=len(tokenizer), initializer_range=0.1, **ids, **OVERRIDES[name] | overrides
    )
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith(".bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    for buffer_name, bias in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            bias.uniform_(-0.2, 0.2)
    generation_config = chat_generation_config if chat else base_generation_config
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compare_with_llama_cpp(folder: Path, gguf: Path) -> tuple[list[int], list[int], np.ndarray]:
    """Greedy tokens of llama.cpp and of the model, and how far their log-probabilities are apart.

    The model is asked about llama.cpp's tokens: one that differs does not make the rest differ.
    """
    model: Any = load_model(folder).eval()
    vocab_size = model.config.vocab_size
    tokenizer: Any = load_tokenizer(folder)
    # The server holds back what is no whole character, and its probabilities with it.
    banned = [i for i in range(vocab_size) if "\ufffd" in tokenizer.decode([i])]
    banned += tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])  # they would end it
    request = {
        **{"prompt": PROMPT, "n_predict": NEW_TOKENS, "temperature": 0},
        **{"logit_bias": [[i, False] for i in banned], "n_probs": vocab_size},
        "return_tokens": True,
    }
    (answer,) = ask(gguf, [("/completion", request)])
    theirs = np.full((NEW_TOKENS, vocab_size), np.nan, np.float32)
    for row, step in zip(theirs, answer["completion_probabilities"], strict=True):
        for entry in step["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + answer["tokens"]])).logits[0]
    ours = logits[len(PROMPT) - 1 : -1].log_softmax(-1)
    distance = np.abs(ours.numpy() - theirs)
    ours[:, banned] = -torch.inf
    return answer["tokens"], ours.argmax(-1).tolist(), distance


@pytest.mark.parametrize("name", OVERRIDES)
def test_llama_cpp_computes_what_the_model_computes(name, tokenizer_dir, tmp_path, capsys):
    folder = save_model(name, tmp_path / "model", tokenizer_dir)
    gguf = tmp_path / "out" / "model.gguf"
    main(["export", str(folder), "--format", "gguf", "--output", str(gguf), "--dtype", "f32"])
    assert capsys.readouterr().out.startswith(f"wrote {gguf}: ")
    assert [path.name for path in gguf.parent.iterdir()] == ["model.gguf"]
    theirs, ours, distance = compare_with_llama_cpp(folder, gguf)
    assert theirs == ours and len(set(theirs)) > 3
    assert distance.max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, overrides",
    [
        (
            "mini_llama3_tiny",
            {
                "attention_bias": True,
                "mlp_bias": True,
                "head_dim": 48,
                "tie_word_embeddings": False,
            },
        ),
        ("mini_deepseekv3_tiny", {"tie_word_embeddings": False, "norm_topk_prob": False}),
        (
            "mini_qwen3_next_tiny",
            {"tie_word_embeddings": False, "mlp_only_layers": [], "num_hidden_layers": 5},
        ),
    ],
)
def test_llama_cpp_computes_variants_of_the_presets(name, overrides, tokenizer_dir, tmp_path):
    folder = save_model(name, tmp_path / "model", tokenizer_dir, **overrides)
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    theirs, ours, distance = compare_with_llama_cpp(folder, tmp_path / "model.gguf")
    assert theirs == ours and distance.max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype, most", [("f16", 0.01), ("bf16", 0.1), ("q8_0", 0.3)])
@pytest.mark.parametrize("name", OVERRIDES)
def test_llama_cpp_runs_every_dtype_as_closely_as_it_allows(
    name, dtype, most, tokenizer_dir, tmp_path, capsys
):
    folder = save_model(name, tmp_path / "model", tokenizer_dir)
    exported = export_gguf(folder, tmp_path / "model.gguf", dtype)
    # Of the sizes of its tiny preset, one does not divide into q8_0's blocks of 32.
    assert (exported.kept_f16 > 0) == (name == "mini_deepseekv3_tiny" and dtype == "q8_0")
    _, _, distance = compare_with_llama_cpp(folder, tmp_path / "model.gguf")
    assert 1e-4 < np.median(distance) < most  # of all: rounding may send a token to another expert


def texts_to_tokenize() -> list[str]:
    """Sentences, and a thousand made-up ones of every kind of character."""
    draw = random.Random(0)
    kinds: dict[str, list[str]] = {}
    for code in range(1, 0x30000):
        kinds.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    # Which characters are letters changes with Unicode's version: only what all versions have.
    kinds = {kind: characters for kind, characters in kinds.items() if kind not in ("Cn", "Cs")}
    pieces = ["'s", "'LL", "’s", " don't", "\r\n", "\n\n", "  ", "\t", "\u3000", " 12345", "３"]
    pieces += ["训练模型", "，。！", "The model", " loss", "é", "😀", "🇨🇳", "x=3.14;", "__"]
    pieces += ["\N{ZERO WIDTH JOINER}", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im", "|>"]
    pieces += ["<think>", "</think>"]
    texts = ["", " ", "\n", "你好，世界！", "Hello, world!  \n\n\tIt's 2024年5月6日."]
    texts.append("".join(pieces))
    for _ in range(1000):
        text = ""
        for _ in range(draw.randint(1, 12)):
            some = pieces if draw.random() < 0.5 else kinds[draw.choice(list(kinds))]
            text += draw.choice(some)
        texts.append(text)
    return texts


def test_llama_cpp_tokenizes_and_renders_a_chat_as_the_tokenizer_does(tmp_path):
    folder = save_model("mini_llama3_tiny", tmp_path / "model", DEFAULT_TOKENIZER, chat=True)
    export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    texts = texts_to_tokenize()
    chats: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "训练 what?"}]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
                {"role": "user", "content": " and  2 + 2?\n"},
            ],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ]
    answers = ask(
        tmp_path / "model.gguf",
        [
            *(
                ("/tokenize", {"content": text, "add_special": True, "parse_special": True})
                for text in texts
            ),
            *(("/apply-template", chat) for chat in chats),
        ],
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for text, answer in zip(texts, answers, strict=False):
        assert answer["tokens"] == tokenizer(text)["input_ids"], text
    for chat, answer in zip(chats, answers[len(texts) :], strict=True):
        assert answer["prompt"] == tokenizer.apply_chat_template(
            chat["messages"],
            add_generation_prompt=True,
            tokenize=False,
            **chat.get("chat_template_kwargs", {}),
        )


def test_the_marks_of_training_go_and_the_rendered_chat_stays():
    tokenizer: Any = load_tokenizer(DEFAULT_TOKENIZER)
    plain = template_for_llama_cpp(tokenizer.chat_template)
    assert "generation -" not in plain and "enable_thinking is defined -" not in plain
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b\n"}] * 2
    rendered = [
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        for template in (plain, tokenizer.chat_template)
    ]
    assert rendered[0] == rendered[1]


def test_the_file_names_the_special_tokens_and_how_the_model_samples(tokenizer_dir, tmp_path):
    from gguf import GGUFReader

    tokenizer: Any = load_tokenizer(tokenizer_dir)
    end, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    for chat in (False, True):
        folder = save_model("mini_llama3_tiny", tmp_path / str(chat), tokenizer_dir, chat=chat)
        export_gguf(folder, tmp_path / "model.gguf")  # the second time over the first
        fields = GGUFReader(tmp_path / "model.gguf").fields
        values = {name: field.contents() for name, field in fields.items()}
        assert values["tokenizer.ggml.eos_token_id"] == (im_end if chat else end)
        assert values["tokenizer.ggml.eot_token_id"] == im_end
        assert values["tokenizer.ggml.padding_token_id"] == end
        assert values["tokenizer.ggml.add_bos_token"] is False
        assert values["tokenizer.ggml.pre"] == "qwen2"
        assert values["llama.context_length"] == 2048
        assert values["general.name"] == str(chat)
        assert values["general.sampling.temp"] == pytest.approx(0.8)
        assert values["general.sampling.top_p"] == pytest.approx(0.95)
        types = values["tokenizer.ggml.token_type"]
        assert [types[i] for i in (end, end + 1, im_end, len(tokenizer) - 1)] == [3, 1, 3, 4]


LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "name, fields, says",
    [
        ("mini_llama3_tiny", {"rope_parameters": LINEAR}, "its rope_type 'linear'"),
        ("mini_llama3_tiny", {"hidden_act": "gelu"}, "its hidden_act is 'gelu'"),
        ("mini_llama3_tiny", {"vocab_size": 365}, "it has 364 entries, the model 365"),
        ("mini_llama3_tiny", {"model_type": "gpt2"}, "no export to GGUF for model_type 'gpt2'"),
        ("mini_deepseekv3_tiny", {"num_hidden_layers": 27}, "27 layers and q_lora_rank 64"),
        ("mini_deepseekv3_tiny", {"rope_interleave": False}, "its rope_interleave is false"),
        ("mini_deepseekv3_tiny", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        ("mini_deepseekv3_tiny", {"attention_bias": True}, "no biases in its attention"),
        ("mini_qwen3_next_tiny", {"linear_value_head_dim": 32}, "linear_value_head_dim 32"),
        ("mini_qwen3_next_tiny", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("mini_qwen3_next_tiny", {"attention_bias": True}, "no biases in its attention"),
        ("mini_qwen3_next_tiny", {"num_experts": 0}, "no Qwen3-Next without experts"),
        (
            "mini_qwen3_next_tiny",
            {"layer_types": ["full_attention", "linear_attention"] * 2},
            "which layer_types is not",
        ),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_by_name(
    name, fields, says, tokenizer_dir, tmp_path, capsys
):
    folder = tmp_path / "model"
    load_tokenizer(tokenizer_dir).save_pretrained(folder)
    build_model(name, vocab_size=364).config.save_pretrained(folder)
    (folder / "model.safetensors").touch()  # never read: all this is before expensive work
    rewrite(folder / "config.json", **fields)
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(folder), "--format", "gguf", "--output", str(tmp_path / "a.gguf")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}") and says in error and error.count("\n") == 1
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"normalizer": {"type": "NFC"}}, "it has a normalizer"),
        ({"pre_tokenizer": None}, "its pre-tokenizer is another"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(fields, says, tokenizer_dir, tmp_path):
    folder = save_model("mini_llama3_tiny", tmp_path, tokenizer_dir, num_hidden_layers=1)
    rewrite(folder / "tokenizer.json", **fields)
    with pytest.raises(ValueError, match=rf"tokenizer\.json cannot be exported .* \({says}\)"):
        export_gguf(folder, tmp_path / "a.gguf")


def test_weights_beyond_f16_are_refused_and_nothing_is_left(tokenizer_dir, tmp_path):
    folder = save_model("mini_llama3_tiny", tmp_path / "model", tokenizer_dir, num_hidden_layers=1)
    model = load_model(folder)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    for value, says in ((1e5, "is 100000; give bf16 or f32"), (float("nan"), "went wrong")):
        weight.data[3, 4] = value
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match=rf"^--dtype f16 cannot hold blk\.0\.ffn_up.*{says}"):
            export_gguf(folder, tmp_path / "a.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_the_gguf_package_one_sentence_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("mini_llm.hub.gguf.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run pip install 'mini_llm\[gguf\]'$"):
        export_gguf(tmp_path, tmp_path / "a.gguf")


@pytest.mark.parametrize("output, says", [("a.bin", "end in .gguf"), ("file/a.gguf", "written")])
def test_an_output_that_cannot_be_is_refused(output, says, tokenizer_dir, tmp_path):
    (tmp_path / "file").touch()
    folder = save_model("mini_llama3_tiny", tmp_path / "model", tokenizer_dir, num_hidden_layers=1)
    with pytest.raises(ValueError, match=rf"^--output .*{says}"):
        export_gguf(folder, tmp_path / output)
