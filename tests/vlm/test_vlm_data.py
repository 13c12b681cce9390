"""Conversations to batches. Oracles: LLaVA's and Open-LLaVA-NeXT's rules in slow plain versions, and their formulas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_llava import byte_tokenizer

from open_clip_ov2.cli import main
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.llava import VisionTower
from open_clip_ov2.vlm import conversations
from open_clip_ov2.vlm.assemble import processor_of
from open_clip_ov2.vlm.batches import ConversationCollator
from open_clip_ov2.vlm.vlm_recipe import FOLDER, VlmRecipe, VlmStage, chat_template, load_vlm_recipe

MEAN, STD = [0.48, 0.45, 0.40], [0.26, 0.26, 0.27]
SYSTEM = "Answer briefly."
SIZE, PATCH = 28, 14
TOKENS = (SIZE // PATCH) ** 2
H, G = "human", "gpt"
RECORDED = {
    "two turns": [(H, "<image>\nWhat is it?"), (G, "A cat."), (H, "What color?"), (G, "Black, and\nwhite.")],
    "picture at the end": [(H, "What is it? <image>"), (G, "A cat.")],
    "no picture": [(H, " Name a color. "), (G, "Blue"), (H, "Another?"), (G, "Red")],
    "picture in the second turn": [(H, "Hello"), (G, "Hi"), (H, "<image>\nWhat is it?"), (G, "A cat.")],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    Image.effect_noise((50, 31), 60).convert("RGB").save(folder / "cat.png")
    return folder


def recipe(template: str, kind: str = "llava", **more: Any) -> VlmRecipe:
    stage = VlmStage("tune", ("projector",), template, 4, 1e-3, 512, pad=True)
    return VlmRecipe(kind, -2, system=SYSTEM, stages=(stage,), **more)


def processor(template: str, kind: str = "llava", **more: Any) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    settings = {
        "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}, "do_center_crop": True,
        "image_mean": MEAN, "image_std": STD, "resample": 2,
    }  # fmt: skip
    return processor_of(VisionTower(None, settings, SIZE, PATCH), tokenizer, recipe(template, kind, **more))


def row_of(turns: list[tuple[str, str]]) -> dict[str, Any]:
    pictures = sum(text.count("<image>") for _, text in turns)
    talk = [{"from": speaker, "value": text} for speaker, text in turns]
    return {"id": 0, "conversations": talk, **({"image": ["cat.png"] * pictures} if pictures else {})}


def in_front(text: str) -> str:
    """LLaVA's preprocess_multimodal: the picture first in its turn, on a line of its own."""
    if "<image>" not in text:
        return text
    return ("<image>\n" + text.replace("<image>", "").strip()).strip()


def plain_rule(template: str, turns: list[tuple[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """(input ids, labels): the whole prompt is written, cut into rounds at the end of a turn, and of each round all up
    to the mark of the answer is masked; a picture is so many placeholders, masked too."""
    if template == "plain":
        picture, caption = "<image>", turns[1][1]
        pieces = [("<s>", False), (picture, False), (caption + "\n", True)]
    else:
        turns = [(speaker, in_front(text)) for speaker, text in turns]
        mark, end, prompt = {
            "vicuna-v1": (
                " ASSISTANT:", "</s>",
                SYSTEM + " " + "".join(f"USER: {t} ASSISTANT:" if s == H else f" {t}</s>" for s, t in turns),
            ),
            "llama-3": (
                "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>",
                f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>" + "".join(
                    f"<|start_header_id|>{'user' if s == H else 'assistant'}<|end_header_id|>\n\n{t}<|eot_id|>"
                    for s, t in turns
                ),
            ),
            "chatml": (
                "<|im_start|>assistant\n", "<|im_end|>",
                f"<|im_start|>system\n{SYSTEM}<|im_end|>\n" + "".join(
                    f"<|im_start|>{'user' if s == H else 'assistant'}\n{t}<|im_end|>\n" for s, t in turns
                ),
            ),
        }[template]  # fmt: skip
        pieces = [] if template == "chatml" else [("<s>", False)]
        while prompt:
            question, found, rest = prompt.partition(mark)
            answer, ended, prompt = rest.partition(end)
            pieces += [(question + found, False), (answer + ended, bool(found))]
    ids, labels = [], []
    for text, trained in pieces:
        for index, part in enumerate(text.split("<image>")):
            new = [tokenizer.convert_tokens_to_ids("<image>")] * TOKENS if index else []
            ids += new
            labels += [-100] * len(new)
            new = tokenizer(part, add_special_tokens=False).input_ids
            ids += new
            labels += new if trained else [-100] * len(new)
    return ids, labels


@pytest.mark.parametrize("template", ["vicuna-v1", "llama-3", "chatml", "plain"])
def test_labels_are_those_of_llava(template: str, pictures: Path) -> None:
    """Oracle: `plain_rule`, on recorded conversations, alone and in one batch with padding."""
    made = processor(template)
    cases = list(RECORDED.values()) if template != "plain" else [RECORDED["picture at the end"]]
    rows = list(conversations.Conversations(pictures)([row_of(turns) for turns in cases]))
    expected = [plain_rule(template, turns, made.tokenizer) for turns in cases]
    collator = ConversationCollator(made, 10_000)
    together = collator.torch_call(rows)
    for index, (row, (ids, labels)) in enumerate(zip(rows, expected, strict=True)):
        alone = collator.torch_call([row])
        assert alone["input_ids"][0].tolist() == ids
        assert alone["labels"][0].tolist() == labels
        assert together["input_ids"][index, : len(ids)].tolist() == ids
        assert together["labels"][index].tolist() == labels + [-100] * (together["labels"].shape[1] - len(labels))
    assert together["pixel_values"].shape[0] == sum(len(row["images"]) for row in rows)


def test_long_conversations_are_cut_on_the_right_and_never_in_a_picture(pictures: Path) -> None:
    """Oracle: the first tokens of the plain rule; an error that names the picture and the limit."""
    turns = RECORDED["picture in the second turn"]
    made = processor("vicuna-v1")
    ids, labels = plain_rule("vicuna-v1", turns, made.tokenizer)
    (row,) = conversations.Conversations(pictures)([row_of(turns)])
    end = 1 + max(place for place, token in enumerate(ids) if token == made.image_token_id)
    cut = ConversationCollator(made, end).torch_call([row])
    assert (cut["input_ids"][0].tolist(), cut["labels"][0].tolist()) == (ids[:end], labels[:end])
    with pytest.raises(UserError, match=rf"cat\.png: its pictures end at token {end}, and max-length is {end - 1};"):
        ConversationCollator(made, end - 1).torch_call([row])


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (40, 40), (300, 7)])
def test_pictures_are_padded_with_the_mean_color(size: tuple[int, int]) -> None:
    """Oracle: LLaVA's rule with PIL: paste into the middle of a square of the mean color, then resize; within 1/255."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in MEAN))
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) / 255
    found = processor("plain").image_processor(picture, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    assert np.abs(found.numpy() * STD + MEAN - expected).max() <= 1 / 255 + 1e-6


def anyres_tokens(width: int, height: int, grids: list[list[int]]) -> int:
    """LLaVA-NeXT's formula: the picture itself, then its grid without the padding, with a newline for each row.

    The grid is that in which most of the picture's pixels remain, and of equals the one with the least padding.
    """
    best, best_key = (0, 0), (-1, 0)
    for rows, columns in grids:
        scale = min(columns * SIZE / width, rows * SIZE / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        key = (used, used - rows * columns * SIZE * SIZE)
        if key > best_key:
            best, best_key = (rows, columns), key
    side = SIZE // PATCH
    rows, columns = best[0] * side, best[1] * side
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    return side * side + rows * columns + rows


def test_any_resolution_gives_as_many_tokens_as_the_formula() -> None:
    """Oracle: `anyres_tokens`, for pictures of many sizes."""
    grids = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
    made = processor("plain", "llava-next", grids=tuple(map(tuple, grids)))
    assert made.image_processor.image_grid_pinpoints == [[rows * SIZE, columns * SIZE] for rows, columns in grids]
    for width, height in [(28, 28), (100, 40), (40, 100), (17, 300), (640, 480), (57, 56), (1, 90)]:
        batch = made(images=Image.new("RGB", (width, height)), text="<image>", return_tensors="pt")
        count = int((batch["input_ids"] == made.image_token_id).sum())
        assert count == anyres_tokens(width, height, grids), (width, height)


def test_rows_that_are_left_out_or_unusual_are_counted_and_listed(pictures: Path, tmp_path: Path) -> None:
    """Oracle: a list of rows with one fault each, and what is written beside the table: the causes, and which rows have
    no picture, several, or one that the text does not name."""
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Image.new("1", (12_000, 12_000)).save(pictures / "bomb.png")
    Image.new("1", (8_000_000, 10)).save(pictures / "line.png")
    good = row_of(RECORDED["two turns"])
    faults = {
        "missing image": {**good, "image": "none.png"},
        "image outside the folder of images": {**good, "image": "../../etc/passwd"},
        "undecodable image": {**good, "image": "broken.png"},
        "too many pixels": {**good, "image": "bomb.png"},
        "odd shape": {**good, "image": "line.png"},
        "another number of <image> than of images": {**good, "image": ["cat.png", "cat.png"]},
        "<image> outside a question": row_of([(H, "<image>"), (G, "<image>")]),
        "turn that is not from human or gpt": {**good, "conversations": [{"from": "tool", "value": "x"}]},
        "turns that do not alternate between question and answer": row_of([(H, "a"), (H, "b"), (G, "c")]),
        "no conversations": {"id": "x"},
        "more than 200,000 characters": row_of([(H, "a"), (G, "b" * 200_001)]),
        "more than 512 turns": row_of([(H, "a"), (G, "b")] * 257),
    }
    several = row_of([(H, "<image>\n<image>\nWhich is larger?"), (G, "The first.")])
    moved = {"id": "m", "image": "cat.png", "conversations": row_of([(H, "What?"), (G, "A cat.")])["conversations"]}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([good, several, moved, row_of(RECORDED["no picture"]), *faults.values()]))
    assert conversations.prepare(file, pictures, tmp_path / "out") == 4
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["rows"], report["used"]) == (4 + len(faults), 4)
    kinds = [conversations.SEVERAL, conversations.MOVED, conversations.TEXT_ONLY]
    assert report["kinds"] == dict.fromkeys(kinds, 1)
    assert report["skipped"] == dict.fromkeys(faults, 1)
    listed = json.loads((tmp_path / "out" / "listed.json").read_text())
    assert [(row["row"], row["cause"], row["used"]) for row in listed] == [
        *((index, kind, True) for index, kind in enumerate(kinds, 1)),
        *((index, cause, False) for index, cause in enumerate(faults, 4)),
    ]
    rows = conversations.open_prepared(tmp_path / "out")
    assert [len(row["images"]) for row in rows] == [1, 2, 1, 0]
    assert [part["type"] for part in rows[1]["messages"][0]["content"]] == ["image", "image", "text"]


def test_the_steps_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: 2,181 and 5,198 steps, which LLaVA-1.5's logs have for 558,128 and 665,298 samples (arXiv 2310.03744)."""
    assert main(["vlm", "train", "logs/RUN", "--out", "vlm/RUN", "--gpus", "8", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "558,128 samples, 2,181 steps: 16 on each of 8 processes x 2" in shown
    assert "665,298 samples, 5,198 steps: 16 on each of 8 processes, template vicuna-v1" in shown
    data = "--align-data FILE --align-images FOLDER --tune-data FILE --tune-images FOLDER"
    assert f"ov2 submit --nodes 1 --gpus-per-node 8 -- vlm train logs/RUN --out vlm/RUN {data}\n" in shown
    for name in ("llava-1.5-llama-3", "open-llava-next", "openvision-small"):
        assert load_vlm_recipe(name).stages[-1].data == "tune"


def test_a_template_by_flag_stands_in_for_those_of_a_recipe(tmp_path: Path) -> None:
    """Oracle: by hand. A recipe may leave templates out then; `plain`, of captions alone, stays."""
    text = (FOLDER / "llava-1.5.toml").read_text()
    (tmp_path / "own.toml").write_text(re.sub('template = "vicuna-v1".*', "", text))
    stages = load_vlm_recipe(str(tmp_path / "own.toml"), template="chatml").stages
    assert [stage.template for stage in stages] == ["plain", "chatml"]
    with pytest.raises(UserError, match="stage 2: template is missing"):
        load_vlm_recipe(str(tmp_path / "own.toml"))


@pytest.mark.parametrize("name", ["vicuna-v1", "llama-3", "chatml"])
def test_templates_render_strings_too(name: str) -> None:
    """lmms-eval gives a message as one string. Oracle: the same message in parts."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template(name, SYSTEM)
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    shown = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        for content in (parts, "<image>\nWhat?")
    ]
    assert shown[0] == shown[1]
