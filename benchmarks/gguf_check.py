"""llama.cpp runs what `adapterhub export` writes, and says what transformers says: greedy text compared.

A base and an adapter release on it (those of `make demo`) are exported: the base in f16 with the adapter as a
GGUF LoRA on it, and the merged model in f16 and q8_0. Each answers the first questions of a held-out file in
llama.cpp, beside the merged checkpoint in transformers. llama-cpp-python is compiled when it is installed
(minutes), so it has an environment of its own, which this script runs its other half in::

    python -m venv TMP/llama && TMP/llama/bin/pip install llama-cpp-python
    python benchmarks/gguf_check.py --llama TMP/llama/bin/python [--base DIR] [--release DIR] [--data FILE]

Two 16-bit formats round differently, so texts may part where two tokens are nearly as likely; where they do
is recorded, with the tokens they share before. Prompts are compared as token ids too: they show that the
tokenizer and the chat template went along.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine

DEMO = Path(__file__).resolve().parents[1] / "demo"
QUESTIONS, NEW_TOKENS = 8, 64

LLAMA = """
import json, sys
from llama_cpp import Llama
import llama_cpp
task = json.load(sys.stdin)
found = {"version": llama_cpp.__version__, "runs": {}}
for name, files in task["models"].items():
    model = Llama(files[0], lora_path=files[1], n_ctx=1024, n_threads=2, verbose=False, logits_all=False)
    answers = []
    for prompt in task["prompts"]:
        ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
        model.reset()
        made = []
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
            if token in task["stops"] or len(made) == task["new_tokens"]:
                break
            made.append(token)
        answers.append({"prompt": ids, "tokens": made})
    found["runs"][name] = {
        "answers": answers,
        "template": model.metadata.get("tokenizer.chat_template"),
    }
    del model
json.dump(found, sys.stdout)
"""


def adapterhub(*arguments: object) -> float:
    """Run a command line; returns its wall time in seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "adapterhub", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return round(time.perf_counter() - began, 1)


def answer_with_transformers(folder: Path, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
    """Greedy tokens of the checkpoint in float32, which rounds nothing that it has in 16 bits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for ids in prompts:
        with torch.inference_mode():
            made = model.generate(
                torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=stops
            )[0, len(ids) :].tolist()
        answers.append([token for token in made if token not in stops])
    return answers


def shared(ours: list[int], theirs: list[int]) -> int:
    """Tokens that two answers begin with alike."""
    pairs = zip(ours, theirs, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def compare(answers: list[dict], expected: list[list[int]], prompts: list[list[int]]) -> dict[str, object]:
    return {
        "prompts_tokenized_alike": sum(a["prompt"] == ids for a, ids in zip(answers, prompts, strict=True)),
        "answers_equal": sum(a["tokens"] == ids for a, ids in zip(answers, expected, strict=True)),
        "of": len(answers),
        "tokens_shared_first": [shared(a["tokens"], ids) for a, ids in zip(answers, expected, strict=True)],
        "tokens_expected": [len(ids) for ids in expected],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", required=True, type=Path, help="Python with llama-cpp-python")
    parser.add_argument("--base", type=Path, default=DEMO / "smollm2-135m-instruct")
    parser.add_argument("--release", type=Path, default=DEMO / "smollm2-orders")
    parser.add_argument("--data", type=Path, default=DEMO / "data" / "test.jsonl")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gguf_check.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = check(options, Path(scratch))
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["against_transformers"], indent=2))


def check(options: argparse.Namespace, scratch: Path) -> dict:
    from transformers import AutoTokenizer

    merged = scratch / "merged"
    files = {name: scratch / f"{name}.gguf" for name in ("base", "lora", "f16", "q8")}
    seconds = export_all(options, merged, files)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    texts = read_questions(options.data, tokenizer)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    stops = [tokenizer.eos_token_id]
    expected = answer_with_transformers(merged, prompts, stops)
    alone = answer_with_transformers(options.base, prompts, stops)
    found = answer_with_llama(options.llama, files, texts, stops)
    with_lora = found["runs"]["base f16 + lora"]["answers"][0]["tokens"]
    return {
        "what": __doc__.splitlines()[0],
        **describe_machine("adapterhub", "gguf", "torch", "transformers"),
        "llama_cpp_python": found["version"],
        "base": options.base.name,
        "release": options.release.name,
        "bytes": {name: path.stat().st_size for name, path in files.items()},
        "seconds": seconds,
        "against_transformers": {
            name: compare(run["answers"], alone if name == "base f16" else expected, prompts)
            | {"template_went_along": run["template"] == tokenizer.chat_template}
            for name, run in found["runs"].items()
        },
        "example": {
            "prompt": texts[0],
            "transformers": tokenizer.decode(expected[0]),
            "llama.cpp, base f16 + lora": tokenizer.decode(with_lora),
            "base alone": tokenizer.decode(alone[0]),
        },
    }


def export_all(options: argparse.Namespace, merged: Path, files: dict[str, Path]) -> dict[str, float]:
    """Merge, then write every GGUF file; wall seconds of each command."""
    base, release = options.base, options.release
    gguf = ("--to", "gguf")
    return {
        "merge": adapterhub(
            "merge", release, "--base", base, "--to", "bf16", "--onto", "original", "--out", merged
        ),
        "export base f16": adapterhub("export", base, *gguf, "--out", files["base"]),
        "export lora": adapterhub("export", release, "--base", base, *gguf, "--out", files["lora"]),
        "export merged f16": adapterhub("export", merged, *gguf, "--out", files["f16"]),
        "export merged q8_0": adapterhub("export", merged, *gguf, "--type", "q8_0", "--out", files["q8"]),
    }


def read_questions(data: Path, tokenizer: Any) -> list[str]:
    """The first prompts of a held-out file, as the chat template has them."""
    rows = [json.loads(line) for line in data.read_text().splitlines()[:QUESTIONS]]
    return [
        tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        for row in rows
    ]


def answer_with_llama(python: Path, files: dict[str, Path], texts: list[str], stops: list[int]) -> dict:
    """What llama.cpp answers with each model, and its version."""
    models = {
        "base f16": (files["base"], None),
        "base f16 + lora": (files["base"], files["lora"]),
        "merged f16": (files["f16"], None),
        "merged q8_0": (files["q8"], None),
    }
    task = {
        "models": {name: [str(path), lora and str(lora)] for name, (path, lora) in models.items()},
        "prompts": texts,
        "stops": stops,
        "new_tokens": NEW_TOKENS,
    }
    done = subprocess.run(
        [str(python), "-c", LLAMA], input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
