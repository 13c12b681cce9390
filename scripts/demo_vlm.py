"""Let a language model answer questions about rendered pictures through an encoder (docs/vlm.md).

    python scripts/demo_vlm.py OUT [--seeds 3] [--encoder NAME=SOURCE ...] [--language-model smollm2-135m]

Draws pictures (scripts/rendered_data.py), writes LLaVA's JSON and held-out questions from their captions, trains a
small language model on text alone, then `ov2 vlm train` and `ov2 vlm eval` for each encoder: the one in the package,
the same with random weights, and those of --encoder (such as a CLIP of the same pictures). OUT/table.md has exact match
by kind. An OUT with the same settings is continued where it was interrupted; more --seeds and --encoder may be added.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import string
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from sample_sets import SETTINGS, reusable, write_json

SHIPPED, IMAGE_SIZE = "ov2-vit-nano-8:rendered", 64
KINDS = {
    "charts": ("charts",), "shapes": ("shapes",), "short words": ("short words",), "words": ("words", "letters"),
    "numbers": ("numbers",),
}  # fmt: skip
PLURAL = {"circles": "circle", "squares": "square", "triangles": "triangle", "stars": "star", "crosses": "cross",
          "hearts": "heart"}  # fmt: skip
LINES = 32  # of text in a step of the language model
RECIPE = """
kind = "llava"
feature-layer = -1

[[stage]]
data = "align"
trains = ["projector"]
template = "plain"
global-batch = 32
lr = 3e-3
warmup-ratio = 0.05
max-length = 256

[[stage]]
data = "tune"
trains = ["projector", "language-model"]
template = "{template}"
global-batch = 32
lr = {lr}
warmup-ratio = 0.05
max-length = 512
epochs = {epochs}
"""


def questions_of(kind: str, caption: str) -> list[tuple[str, str]]:
    """Questions about a picture and their only right answers, from its caption."""
    words = caption.split()
    if kind == "charts":
        bars = re.findall(r"(\w+) (\d)", caption)
        return [(f"what is the value of {color}?", value) for color, value in bars]
    if kind == "shapes":
        if words[1] in ("small", "large"):  # a small red circle at the top left
            return [
                ("what color is the shape?", words[2]), ("what shape is it?", words[3]), ("how large is it?", words[1]),
                ("where is it?", " ".join(words[6:])),
            ]  # fmt: skip
        if words[-1] in PLURAL:  # three red circles
            return [("how many are there?", words[0]), ("what color are they?", words[1]),
                    ("what shape are they?", PLURAL[words[-1]])]  # fmt: skip
        found = re.fullmatch(r"an? (\w+) (\w+) (left of|above) an? (\w+) (\w+)", caption)
        assert found, caption
        first, second = ("left", "right") if found[3] == "left of" else ("upper", "lower")
        return [
            (f"what color is the {first} shape?", found[1]), (f"what shape is the {first} one?", found[2]),
            (f"what color is the {second} shape?", found[4]), (f"what shape is the {second} one?", found[5]),
        ]  # fmt: skip
    return [("what number is it?" if kind == "numbers" else "what does the sign say?", words[-1])]


def pictures(folder: Path) -> list[tuple[str, str, str]]:
    """(file of the picture, kind, caption), each picture written beside its tar."""
    found = []
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                stem, _, ending = member.name.rpartition(".")
                file = archive.extractfile(member)
                assert file is not None
                if ending == "jpg":
                    (folder / member.name).write_bytes(file.read())
                elif ending == "json":
                    about = json.loads(file.read())
                    found.append((f"{stem}.jpg", about["kind"], about["captions"][0]))
    return found


def write_data(args: argparse.Namespace) -> list[str]:
    """align.json, tune.json, questions.jsonl and shuffled.jsonl in OUT; the training captions."""
    data, rng = args.out / "data", random.Random(0)
    run([sys.executable, "scripts/rendered_data.py", data, "--train", args.pictures, "--short", args.short,
         "--short-length", 4, "--held-out", args.held_out])  # fmt: skip
    group = {kind: name for name, kinds in KINDS.items() for kind in kinds}
    train = [(f"{split}/{file}", kind, caption) for split in ("train", "short")
             for file, kind, caption in pictures(data / split) if kind in group]  # fmt: skip
    rng.shuffle(train)
    align, tune = [], []
    for file, kind, caption in train:
        asked = questions_of(kind, caption)
        rng.shuffle(asked)
        turns = [
            {"from": who, "value": text} for pair in asked for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        tune.append({"id": file, "image": file, "conversations": turns})
        said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        align.append({"id": file, "image": file, "conversations": said})
    (args.out / "align.json").write_text(json.dumps(align[: args.align]))
    (args.out / "tune.json").write_text(json.dumps(tune))
    lines = [
        {"id": f"{file}/{number}", "image": f"held-out/{file}", "question": question, "answer": answer,
         "group": group[kind]}
        for file, kind, caption in pictures(data / "held-out") if kind in group
        for number, (question, answer) in enumerate(questions_of(kind, caption))
    ]  # fmt: skip
    others = [line["image"] for line in lines]
    rng.shuffle(others)
    shuffled = [{**line, "image": other} for line, other in zip(lines, others, strict=True)]
    for name, rows in (("questions", lines), ("shuffled", shuffled)):
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [json.dumps([kind, caption]) for _, kind, caption in train]


def tokenizer_of(captions: list[str]) -> Any:
    """Word pieces: letters, digits, and the words of captions of charts and shapes and of questions."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase + string.digits
    words = {"USER", "ASSISTANT", ":", "?", ".", "the", "word", "number"}
    for kind, caption in map(json.loads, captions):
        asked = [question.rstrip("?") for question, _ in questions_of(kind, caption)]
        drawn = caption if kind in ("charts", "shapes") else ""
        words |= {word for text in (drawn, *asked) for word in text.split() if len(word) > 1}
    pieces = ["[pad]", "<s>", "</s>", "[unk]", *letters, *(f"##{letter}" for letter in letters), *sorted(words)]
    made = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[unk]"))
    made.normalizer, made.pre_tokenizer = normalizers.NFC(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="[pad]", unk_token="[unk]",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_language_model(folder: Path, captions: list[str], steps: int, seed: int) -> None:
    """A Llama of 0.7 M parameters that answers questions about a caption which is given as text: what a picture will
    stand for. Loss on all tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), tokenizer_of(captions)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 20), pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        texts = []
        for kind, caption in map(json.loads, rng.sample(captions, min(LINES, len(captions)))):
            asked = questions_of(kind, caption)
            rng.shuffle(asked)
            turns = [f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in asked]
            texts.append(f"<s>USER: {caption} " + turns[0].removeprefix("USER: ") + "".join(turns[1:]))
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(
                f"language model: step {step}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True
            )
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def random_encoder(folder: Path, seed: int) -> None:
    """The shipped encoder's shape and preprocessing with new weights, as a folder of transformers."""
    import torch

    from open_clip_ov2.vlm.towers import open_tower

    tower = open_tower(SHIPPED, IMAGE_SIZE)
    torch.manual_seed(seed)
    type(tower.model)(tower.model.config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(tower.image_processor)))


def run(words: list[Any]) -> None:
    """Run a command and show it; its failure ends the demo."""
    print("\n$", " ".join(map(str, words)), flush=True)
    if subprocess.run(list(map(str, words))).returncode:
        sys.exit(1)


def one_run(args: argparse.Namespace, name: str, encoder: str, language_model: str, seed: int) -> dict[str, Any]:
    """Scores by kind of one encoder and seed, and under `shuffled` those of the shipped one with other pictures."""
    folder, scores = args.out / "vlm" / f"{name}-{seed}", {}
    ov2 = [sys.executable, "-m", "open_clip_ov2", "vlm"]
    data = args.out / "data"
    run([*ov2, "train", encoder, "--out", folder, "--recipe", args.out / "recipe.toml",
         "--language-model", language_model, "--align-data", args.out / "align.json", "--align-images", data,
         "--tune-data", args.out / "tune.json",
         "--tune-images", data, "--batch-size", 32, "--workers", 0, "--seed", seed,
         *(["--image-size", IMAGE_SIZE] if encoder == SHIPPED else [])])  # fmt: skip
    for file in ("questions", "shuffled") if name == "ov2" else ("questions",):
        found = folder / "eval" / f"{file}-scores.json"
        if not found.is_file():
            run([*ov2, "eval", folder, "--questions", args.out / f"{file}.jsonl", "--question-images", data,
                 "--batch-size", 64, "--max-new-tokens", 16])  # fmt: skip
        scores[file] = json.loads(found.read_text())["found"]
    return scores


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Exact match in percent by kind: the mean over the seeds and, with several, the least and the most."""
    columns = list(found)
    lines = [f"| exact match | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for kind in ("all", *KINDS):
        cells = []
        for rows in found.values():
            values = [100 * (row if kind == "all" else row["by_group"][kind])["score"] for row in rows]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1f}{spread}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=7000, help="training pictures of all kinds")
    parser.add_argument("--short", type=int, default=2500, help="and of text of at most four letters")
    parser.add_argument("--align", type=int, default=2500, help="pictures of the alignment")
    parser.add_argument("--held-out", type=int, default=60, help="held-out pictures of each kind")
    parser.add_argument("--epochs", type=int, default=1, help="of tuning")
    parser.add_argument(
        "--language-steps", type=int, default=300, help=f"of {LINES} lines, for the small language model"
    )
    parser.add_argument("--language-model", help="default: a small one is trained here")
    parser.add_argument("--encoder", action="append", default=[], metavar="NAME=SOURCE", help="one more encoder")
    parser.add_argument("--seeds", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Data, language model, then each encoder and seed, and the table."""
    args, started = parse(), time.monotonic()
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "seeds", "encoder")}
    if not reusable(args.out, settings):
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / SETTINGS, settings)
    captions = write_data(args)
    small = args.language_model is None
    template, lr = ("vicuna-v1", "1e-3") if small else ("chatml", "1e-4")
    (args.out / "recipe.toml").write_text(RECIPE.format(template=template, lr=lr, epochs=args.epochs))
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        language_model, untrained = args.out / f"language-model-{seed}", args.out / f"random-encoder-{seed}"
        if small and not language_model.is_dir():
            make_language_model(language_model, captions, args.language_steps, seed)
        if not untrained.is_dir():
            random_encoder(untrained, seed)
        encoders = {"ov2": SHIPPED, "random": str(untrained)} | dict(one.split("=", 1) for one in args.encoder)
        for name, encoder in encoders.items():
            scores = one_run(args, name, encoder, args.language_model or str(language_model), seed)
            found.setdefault(name, []).append(scores["questions"])
            if name == "ov2":
                found.setdefault("ov2, pictures shuffled", []).append(scores["shuffled"])
            (args.out / "table.md").write_text(table(found))
    used = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = f"{time.monotonic() - started:.0f} s, {used:.0f} s of processor time"
    print(f"\n{table(found)}\n{seconds}; the table is in {args.out / 'table.md'}")


if __name__ == "__main__":
    main()
