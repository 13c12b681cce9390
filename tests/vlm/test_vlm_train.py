"""`ov2 vlm train` in real processes: killed, told to stop, resumed, on one process and on two."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import write_recipe
from training import Rank, finish, results, start_ranks, wait_for
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaForCausalLM

from open_clip_ov2.cli import main
from open_clip_ov2.errors import INTERRUPTED_STATUS
from open_clip_ov2.tracking.status import FINISHED, read_status
from open_clip_ov2.vlm import assemble
from open_clip_ov2.vlm.trained_parts import freeze_others
from open_clip_ov2.vlm.vlm_recipe import load_vlm_recipe


def _vlm_train(*flags: str) -> int:
    from open_clip_ov2.cli import main

    return main(["vlm", "train", *flags])


def _vlm_train_sharded(*flags: str) -> int:
    """accelerate 1.15 turns FSDP on for GPUs alone (AcceleratorState); here it is turned on for CPUs, and all that
    follows is the real thing."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
    return _vlm_train(*flags)


def flags(parts: Path, out: Path, **more: object) -> list[str]:
    """A run of two stages of five steps each; saved after each step."""
    values = {
        "recipe": parts / "recipe.toml", "language-model": parts / "lm", "out": out, "workers": 0, "batch-size": 2,
        "save-every-steps": 1, "log-every-n-steps": 1,
        **{f"{name}-data": parts / "data" / f"{name}.json" for name in ("align", "tune")},
        **{f"{name}-images": parts / "data" / "pictures" for name in ("align", "tune")},
        **more,
    }  # fmt: skip
    return [str(parts / "encoder"), *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def start(argv: Sequence[str], processes: int = 1) -> list[Rank]:
    return start_ranks(_vlm_train, argv, processes)


def train(argv: Sequence[str], processes: int = 1) -> None:
    done = finish(start(argv, processes))
    assert [status for status, _ in done] == [0] * processes, done


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def one(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs, by one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    train(flags(parts, run))
    return run


@pytest.fixture(scope="module")
def two(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two processes."""
    run = tmp_path_factory.mktemp("two") / "run"
    train(flags(parts, run), processes=2)
    return run


def test_two_processes_train_the_same_model(one: Path, two: Path) -> None:
    """Oracle: one process with the same global batches, in two steps of accumulation: losses and weights."""
    losses = [[row["loss"] for row in results(run, "train")] for run in (one, two)]
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    first, second = weights(one), weights(two)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-4, rtol=0, msg=name)


def test_sharded_by_fsdp2_a_run_is_the_same(one: Path, parts: Path, tmp_path: Path) -> None:
    """Weights, gradients and moments split over two processes, told to stop in stage 2, and resumed. Oracle: losses and
    weights of one process; a folder that opens strictly."""
    (tmp_path / "fsdp.toml").write_text("fsdp = true\n")
    run, sharding = tmp_path / "run", {"trainer": tmp_path / "fsdp.toml"}
    ranks = start_ranks(_vlm_train_sharded, flags(parts, run, **sharding), 2)
    assert wait_for(lambda: seen(run) >= 28, ranks)
    ranks[0].send_signal(signal.SIGTERM)
    stopped = finish(ranks)
    assert [status for status, _ in stopped] == [INTERRUPTED_STATUS] * 2, stopped
    done = finish(start_ranks(_vlm_train_sharded, flags(parts, run, **sharding), 2))
    assert [status for status, _ in done] == [0, 0], done
    losses = [[row["loss"] for row in results(folder, "train")] for folder in (one, run)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    expected, found = weights(one), weights(run)
    for name, value in expected.items():
        torch.testing.assert_close(value, found[name], atol=1e-4, rtol=0, msg=name)
    _, report = AutoModelForImageTextToText.from_pretrained(run, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("", "fsdp splits weights over processes, and there is only one"),
        ('[fsdp_config]\nstate_dict_type = "SHARDED_STATE_DICT"', "only version 2 with FULL_STATE_DICT"),
        ("[fsdp_config]\nversion = 1", "only version 2 with FULL_STATE_DICT"),
    ],
)
def test_sharding_that_cannot_be_is_refused(
    settings: str, message: str, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: status 2, one line, and no folder of a run."""
    (tmp_path / "fsdp.toml").write_text(f"fsdp = true\n{settings}")
    assert main(["vlm", "train", *flags(parts, tmp_path / "run", trainer=tmp_path / "fsdp.toml")]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_fsdp_that_accelerate_leaves_out_is_refused(parts: Path, tmp_path: Path) -> None:
    """Two processes on CPUs, which accelerate would train by DistributedDataParallel. Oracle: status 2 and one line."""
    (tmp_path / "fsdp.toml").write_text("fsdp = true")
    for status, errors in finish(start(flags(parts, tmp_path / "run", trainer=tmp_path / "fsdp.toml"), 2)):
        assert status == 2
        assert "fsdp: accelerate splits weights over GPUs, and has none" in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_run_continues_bit_for_bit(
    processes: int, parts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The last rank alone gets SIGTERM in stage 1 and SIGKILL in stage 2. Oracle: the undisturbed run's weights and
    records. It fails if Trainer alone loads the weights: transformers 5.24 then continues with those of the stage's
    beginning."""
    undisturbed = request.getfixturevalue("one" if processes == 1 else "two")
    run, argv = tmp_path / "run", flags(parts, tmp_path / "run")
    for samples, number in ((4, signal.SIGTERM), (28, signal.SIGKILL)):
        ranks = start(argv, processes)
        assert wait_for(lambda samples=samples: seen(run) >= samples, ranks)
        ranks[-1].send_signal(number)
        *others, last = finish(ranks)
        assert last[0] == (INTERRUPTED_STATUS if number == signal.SIGTERM else -number), last
        for status, errors in others:  # they save and stop with it, or notice that it is gone
            assert (status == INTERRUPTED_STATUS) if number == signal.SIGTERM else status > 0, errors
        assert seen(run) < (20 if number == signal.SIGTERM else 40), "the stage was over before it was stopped"
    train(argv, processes)
    again = weights(run)
    assert [name for name, value in weights(undisturbed).items() if not torch.equal(value, again[name])] == []
    rows = [[(row["samples_seen"], row["loss"]) for row in results(folder, "train")] for folder in (undisturbed, run)]
    assert rows[0] == rows[1]
    status = read_status(run)
    assert status is not None
    assert (status.state, status.samples_seen, status.restarts) == (FINISHED, 40, 2)
    if processes == 1:  # killed at the very end, with the model complete, it only clears up
        for left in (run / "stages" / "2" / "half", run / ".tmp-model" / "half"):
            left.parent.mkdir()
            left.touch()
        train(argv)
        assert not [path for path in (run / "stages" / "2", run / ".tmp-model") if path.exists()]
        assert weights(run).keys() == again.keys()


def seen(run: Path) -> int:
    """Samples at the newest record."""
    try:
        return max((row["samples_seen"] for row in results(run, "train")), default=0)
    except (OSError, json.JSONDecodeError):
        return 0


def test_each_stage_trains_its_parts_alone(parts: Path, tmp_path: Path) -> None:
    """LLaVA-NeXT; in the second stage all is trained, the encoder at a tenth of the rate. Oracle: the tensors of the
    encoder's own export and of the language model, and of the stage before, bit for bit; the optimizer's rates."""
    everything = '["tower", "projector", "language-model"]'
    write_recipe(parts / "next.toml", "llava-next", everything, "grids = [[1, 2], [2, 1], [2, 2]]")
    run = tmp_path / "run"
    train(flags(parts, run, recipe=parts / "next.toml"))
    assert main(["export", str(parts / "encoder"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    vision, words = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", parts / "lm"))
    first, last = load_file(run / "stages" / "1" / "model.safetensors"), weights(run)
    assert all(torch.equal(first[f"vision_tower.{name}"], value) for name, value in vision.items())
    layers = [name for name in words if ".layers." in name]
    assert layers
    assert all(torch.equal(first[f"language_model.{name}"], words[name]) for name in layers)
    unused = ["encoder.layer.2.", "layernorm.", "pooler."]  # with feature layer -2 of three blocks
    frozen = {name for name in last if any(name.startswith(f"vision_tower.{part}") for part in unused)}
    assert len(frozen) == 16 + 2 + 2
    same = {name for name in last if torch.equal(first[name], last[name])}
    # A key's bias moves no softmax, so its gradient is rounding alone, and may be zero.
    assert {name for name in same ^ frozen if not name.endswith("key.bias")} == set()
    rates = [(row["lr"], row["tower_lr"]) for row in results(run, "train") if row["stage"] == 2]
    assert [tower for _, tower in rates] == pytest.approx([0.1 * lr for lr, _ in rates], rel=1e-12)
    assert max(tower for _, tower in rates) == 1e-3
    model, report = AutoModelForImageTextToText.from_pretrained(run, output_loading_info=True)
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]


def test_a_frozen_tower_is_never_changed(one: Path, parts: Path, tmp_path: Path) -> None:
    """Oracle: the tensors of the encoder's own export after both stages, bit for bit; with bfloat16 and a language
    model of that dtype, those rounded once."""
    LlamaForCausalLM.from_pretrained(parts / "lm", dtype=torch.bfloat16).save_pretrained(tmp_path / "lm")
    AutoTokenizer.from_pretrained(parts / "lm").save_pretrained(tmp_path / "lm")
    run = tmp_path / "run"
    train(flags(parts, run, **{"language-model": tmp_path / "lm", "precision": "bf16"}))
    assert main(["export", str(parts / "encoder"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    tower = load_file(tmp_path / "hf" / "model.safetensors")
    for folder, dtype in ((one, torch.float32), (run / "stages" / "1", torch.bfloat16), (run, torch.bfloat16)):
        found = weights(folder)
        assert {value.dtype for name, value in found.items() if name.startswith("vision_tower.")} == {dtype}
        assert [name for name, value in tower.items() if not found[f"vision_tower.{name}"].equal(value.to(dtype))] == []
    assert {value.dtype for value in weights(run).values()} == {torch.bfloat16}
    words, trained = load_file(tmp_path / "lm" / "model.safetensors"), weights(run)
    layers = [name for name in words if ".layers." in name]
    assert any(not trained[f"language_model.{name}"].equal(words[name]) for name in layers)


def test_minigpt4s_projector_is_one_linear_layer(parts: Path, tmp_path: Path) -> None:
    """Oracle: one matrix and one bias on the tokens, and these two alone train in the first stage."""
    recipe = load_vlm_recipe(str(parts / "recipe.toml"), projector="linear")
    assemble.build(str(parts / "encoder"), str(parts / "lm"), recipe, tmp_path / "llava", seed=0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    projector, tokens = model.model.multi_modal_projector, torch.randn(2, 16, 64)
    torch.nn.init.normal_(projector.linear_1.bias)
    expected = tokens @ projector.linear_1.weight.T + projector.linear_1.bias
    torch.testing.assert_close(projector(tokens), expected, rtol=0, atol=1e-6)
    names = [f"model.multi_modal_projector.linear_1.{name}" for name in ("weight", "bias")]
    assert freeze_others(model, recipe.stages[0], half=None) == names
