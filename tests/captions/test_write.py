"""`ov2 captions write`: a set does not depend on batches, kills and processes, and one sample costs no other."""

from __future__ import annotations

import io
import random
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from export_fixtures import make_language_model, make_run
from PIL import Image
from square_shards import write_square_shards
from tokenizers.processors import TemplateProcessing

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import captions_soak

from open_clip_ov2.captions import engine_hub, engine_ov2
from open_clip_ov2.captions.engine_hub import open_processor, special_texts
from open_clip_ov2.captions.engines import Prompts, Request, read_sampler, row_sampling
from open_clip_ov2.captions.write import NO_TEXT, Task, Writing, task_here
from open_clip_ov2.cli import main
from open_clip_ov2.data.captions import CaptionKey, cleaned, parse_caption_keys
from open_clip_ov2.data.sidecars import begin_set, read_sidecar, sidecar_path
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import UserError

SAMPLING = ["--sampling", "top-k=5,temperature=2", "--sampling", "greedy,weight=0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars, a run and a LLaVA of random weights."""
    folder = tmp_path_factory.mktemp("writing")
    write_square_shards(folder / "squares", 2, 9)
    make_language_model(folder / "words")
    run = make_run(folder / "run")
    run.export("llava", folder / "llava", "--language-model", str(folder / "words"))
    with tarfile.open(folder / "odd.tar", "w") as tar:
        picture = next(read_tar(str(folder / "squares" / "00000.tar"), print))["png"]
        entries = {"a.png": picture, "a.txt": b"<image> a <image> red </s> square", "b.png": b"no picture"}
        line = io.BytesIO()
        Image.new("1", (20_000, 4)).save(line, "png")  # resized to a short side it would be gigabytes
        entries |= {"c.txt": b"no picture at all", "d.png": picture, "e.png": line.getvalue()}
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def flags(folder: Path, model: str, *more: str) -> list[str]:
    tars = str(folder / "squares" / "{00000..00001}.tar")
    return [tars, "--model", str(folder / model), "--device", "cpu", "--max-tokens", "6", *SAMPLING, *more]


def captions(out: Path) -> list[dict[str, str]]:
    return [line for path in sorted(out.glob("*.jsonl.gz")) for line in read_sidecar(path)]


@pytest.mark.parametrize(("model", "tasks"), [("run", 2), ("llava", 1)])
def test_kills_and_processes_change_no_byte(folder: Path, tmp_path: Path, model: str, tasks: int) -> None:
    """Oracle: the sidecars of a run that nobody disturbs. scripts/captions_soak.py does it 36 times each."""
    argv = flags(folder, model, "--batch-size", "2", "--condition", "txt")
    assert main(["captions", "write", *argv, "--out", str(tmp_path / "whole")]) == 0
    assert captions_soak.soak(argv, tmp_path / "killed", tasks, 2, 18, random.Random(0)) > 0
    wanted = captions_soak.sidecars(tmp_path / "whole")
    assert len(wanted) == 2
    assert captions_soak.sidecars(tmp_path / "killed") == wanted
    assert not list((tmp_path / "killed").glob(".writing/*"))


def test_what_a_kill_after_the_last_line_leaves_is_cleared_away(folder: Path, tmp_path: Path) -> None:
    """The process died between the sidecar's rename and the removal of its journal. Oracle: the set before."""
    argv = ["captions", "write", *flags(folder, "run"), "--out", str(tmp_path)]
    assert main(argv) == 0
    before = captions_soak.sidecars(tmp_path)
    (tmp_path / ".writing" / "00000").mkdir(parents=True)
    (tmp_path / ".writing" / "00000" / "lines.jsonl").write_text('{"key": "0000"}\n')
    (tmp_path / ".tmp-00000.jsonl.gz.1").touch()
    assert main(argv) == 0
    assert captions_soak.sidecars(tmp_path) == before
    assert not (tmp_path / ".writing").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("model", ["run", "llava"])
def test_a_caption_does_not_depend_on_its_batch(folder: Path, tmp_path: Path, model: str) -> None:
    """Property: batches of 3 and of 9. Another seed gives others, greedy samples aside."""
    for name, more in {"three": ["--batch-size", "3"], "nine": ["--batch-size", "9"], "other": ["--seed", "1"]}.items():
        assert main(["captions", "write", *flags(folder, model, *more), "--out", str(tmp_path / name)]) == 0
    three, nine, other = (captions(tmp_path / name) for name in ("three", "nine", "other"))
    assert three == nine
    assert [line["key"] for line in three] == [f"{number:06d}" for number in range(18)]
    assert sum(one != two for one, two in zip(three, other, strict=True)) >= 6


def test_odd_samples_get_a_line_each(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image's placeholder and an end of text in an alt-text, bytes that are no picture, no picture, no alt-text.

    Oracle: the processor fails on the text as it is, and the lines are those of the samples."""
    processor = open_processor(str(folder / "llava"))
    with pytest.raises(Exception, match=r"[Ii]mage"):
        processor(images=[], text=["<image> a <image>"], return_tensors="pt")
    assert cleaned("<image> a <image> red </s>", special_texts(processor)) == "a red"
    argv = [str(folder / "odd.tar"), "--condition", "txt", "--device", "cpu", "--max-tokens", "6"]
    assert main(["captions", "write", *argv, "--model", str(folder / "llava"), "--out", str(tmp_path)]) == 0
    lines = captions(tmp_path)
    assert [line["key"] for line in lines] == list("abcde")
    assert lines[4]["error"] == "odd shape"
    assert [line.get("error") for line in lines[1:3]] == ["undecodable image", "missing image"]
    assert all(line.get("error", NO_TEXT) == NO_TEXT for line in (lines[0], lines[3]))
    capsys.readouterr()
    assert main(["captions", "write", *argv, "--model", str(folder / "run"), "--out", str(tmp_path)]) == 2
    assert "was begun with engine transformers, not ov2" in capsys.readouterr().err
    assert main(["captions", "write", *argv, "--status", "--out", str(tmp_path)]) == 0
    assert "1 of 1 shards are finished" in capsys.readouterr().out


def test_a_prompt_takes_any_texts_of_a_sample(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the prompts, by hand. A text that looks like a place is text; the package's own model takes none."""
    keys = parse_caption_keys("txt,json:about.title")
    sample = {"txt": b"a {json:about.title}</s> cat", "json": b'{"about": {"title": "Max\\u0000 2"}}'}
    named = Prompts(keys, "Alt: {txt}. Title: {json:about.title}. {x}", "none")
    assert named.of(sample, ["</s>"]) == "Alt: a {json:about.title} cat. Title: Max 2. {x}"
    assert named.of({"json": sample["json"]}, ()) == "Alt: . Title: Max 2. {x}"
    assert Prompts(keys, "{text} :", "none").of(sample, ["</s>"]) == "a {json:about.title} cat Max 2 :"
    assert [named.of({"txt": b" "}, ()), Prompts((), "{text} :", "none").of(sample, ())] == ["none", "none"]
    argv = ["captions", "write", str(folder / "odd.tar"), "--condition", "txt,json:title", "--out", str(tmp_path)]
    assert main([*argv, "--prompt", "Title: {json:title}"]) == 2
    assert "{text} is missing, where the text of --condition goes, or each place in it" in capsys.readouterr().err
    assert main([*argv, "--image-size", "8"]) == 2
    assert "the package's own model was trained without prompts" in caplog.text


class Failing:
    """A model of ours that cannot take some samples, and raises for a batch that has one."""

    def __init__(self, model: Path, bad: set[str]) -> None:
        self._engine, self._bad, self.calls = engine_ov2.Ov2Engine(str(model), "cpu", 6), bad, list[int]()
        self.model, self.special = self._engine.model, self._engine.special

    def captions(self, requests: Sequence[Request]) -> list[str]:
        self.calls.append(len(requests))
        if any(request.key in self._bad for request in requests):
            raise RuntimeError("out of memory\nin a second line")
        return self._engine.captions(requests)


def test_a_failed_batch_costs_the_one_sample(folder: Path, tmp_path: Path) -> None:
    """Oracle: the lines of a model that does not fail; a model that always fails ends the command instead."""
    url = str(folder / "squares" / "00000.tar")

    def written(name: str, bad: set[str]) -> tuple[list[dict[str, str]], list[int]]:
        engine = Failing(folder / "run", bad)
        begin_set(tmp_path / name, {})
        prompts = Prompts((CaptionKey("txt"),), "{text} :", "")
        writing = Writing(engine, prompts, (read_sampler("top-k=9,temperature=2"),), 0, 8, 10**6, 2)
        writing.write([url], tmp_path / name, Task(0, 1))
        return list(read_sidecar(sidecar_path(tmp_path / name, url))), engine.calls

    plain, _ = written("plain", set())
    lines, calls = written("failing", {"000005"})
    assert calls == [8, 4, 4, 2, 1, 1, 2, 1]
    assert lines[5] == {"key": "000005", "error": "RuntimeError: out of memory"}
    assert lines[:5] + lines[6:] == plain[:5] + plain[6:]
    with pytest.raises(UserError, match="fails on every picture of a batch: RuntimeError: out of memory"):
        written("broken", {f"{number:06d}" for number in range(8)})


def test_tasks_and_samplers_follow_from_what_they_are_given() -> None:
    """Oracle: SLURM's and torchrun's documented variables; the weights, counted."""
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2"}
    array |= {"SLURM_ARRAY_TASK_COUNT": "4"}
    assert task_here({}) == (0, 1)
    assert task_here({"RANK": "2", "WORLD_SIZE": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}) == (2, 8)
    assert task_here(array) == (2, 4)
    assert task_here({**array, "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}) == (21, 32)
    samplers = (read_sampler("greedy,weight=3"), read_sampler("top-k=20,temperature=0.7"))
    drawn = [row_sampling(samplers, 0, str(key)) for key in range(4000)]
    assert sum(one.top_k == 1 for one in drawn) / 4000 == pytest.approx(0.75, abs=0.03)
    assert len({one.seed for one in drawn}) == 4000
    assert drawn[7] == row_sampling(samplers, 0, "7")
    for text in ("greedy,top-k=3", "temperature=1", "top-k=0", "top-k=3,weight=0", "beam"):
        with pytest.raises(UserError, match=r"greedy|top-k|weight|KEY=VALUE"):
            read_sampler(text)


def test_what_vllm_is_given_is_what_it_takes(folder: Path) -> None:
    """Oracle: vLLM's own request types, which check their values. Writing with it needs a GPU."""
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'open_clip_ov2[vllm]'")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.inputs import TextPrompt

    processor, picture = open_processor(str(folder / "llava")), Image.new("RGB", (64, 48))
    for text, temperature in (("greedy", 0.0), ("top-k=5,temperature=0.7", 0.7)):
        request = Request("a", picture, "red", row_sampling([read_sampler(text)], 0, "a"))
        taken = vllm.SamplingParams(**engine_hub.sampling_options(request, 12))
        assert (taken.temperature, taken.max_tokens) == (temperature, 12)
        assert temperature == 0 or (taken.top_k, taken.seed) == (5, request.sampling.seed)
        prompt = engine_hub.text_prompt(processor, request, 32)
        assert set(prompt) <= TextPrompt.__required_keys__ | TextPrompt.__optional_keys__
        assert min(prompt["multi_modal_data"]["image"].size) == 32
    arguments = EngineArgs(model="any", **engine_hub.LLM_OPTIONS)
    assert all(getattr(arguments, name) == value for name, value in engine_hub.LLM_OPTIONS.items())


def test_a_conversation_has_one_token_of_its_beginning(folder: Path) -> None:
    """By the template, or by the tokenizer, which would add a second one. Oracle: the ids that the model gets."""
    processor = open_processor(str(folder / "llava"))
    tokenizer = processor.tokenizer
    processor.chat_template = "{{ bos_token }}{% for m in messages %}<image> red{% endfor %}"
    request = Request("a", Image.new("RGB", (8, 8)), "red", row_sampling([read_sampler("greedy")], 0, "a"))
    for adds_it in (False, True):
        if adds_it:
            piece = (tokenizer.bos_token, tokenizer.bos_token_id)
            backend = tokenizer.backend_tokenizer
            backend.post_processor = TemplateProcessing(single=f"{piece[0]} $A", special_tokens=[piece])
        prompt = engine_hub.text_prompt(processor, request, None)["prompt"]
        assert tokenizer(prompt).input_ids.count(tokenizer.bos_token_id) == 1
