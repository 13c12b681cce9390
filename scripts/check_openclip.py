"""Check this plugin against a checkout of another version of OpenCLIP: `python scripts/check_openclip.py PATH`.

All but training: the tests below run in a process whose `open_clip` is the checkout's, and a model trained with the
installed version is embedded, evaluated, captioned with and exported there and here, which has to give the same. The
last line is a row for the table of docs/openclip.md; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
FILES = [
    *(f"tests/openclip/test_{name}.py" for name in (
        "registration", "open_model", "released", "tokenizer", "caching", "shipped", "shipped_model", "image_size",
        "baseline_configs", "related", "caption_command", "eval_models",
    )),
    "tests/core", "tests/evaluate", "tests/formats",
]  # fmt: skip
# Tests in these files that train, or are about names that only training rebinds.
TRAINING = (
    "open_clip_train", "create_optimizer_v2", "zeropower", "DistributedDataParallel", "runs_check_the_private_names",
    "page_lists", "refuses_before_it_starts", "recipe_is_refused", "trained_evaluated_and_opened",
    "run_starts_from_a_released", "card_says_what_the_run", "hub_gets_what", "ends_the_run_before_it_starts",
)  # fmt: skip
TOLERANCE = 1e-4  # relative, of metrics: kernels add float32 in another order
EMBED = """
import sys, torch, open_clip_ov2
model = open_clip_ov2.open_model(sys.argv[1]).model
images = torch.randn(4, 3, *model.visual.image_size, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save({"pooled": model.encode_image(images), "tokens": model.features(images, layer=-2)}, sys.argv[2])
"""


def environment(checkout: Path | None) -> dict[str, str]:
    paths = ([checkout / "src"] if checkout else []) + [ROOT / "src"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def run(words: list[str], checkout: Path | None) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(checkout), check=True)


def use(model: Path, data: Path, out: Path, checkout: Path | None) -> None:
    """What one can do with a model without training it, written into a folder."""
    ov2 = ["-m", "open_clip_ov2"]
    out.mkdir()
    run(["-c", EMBED, str(model), str(out / "features.pt")], checkout)
    run(
        [*ov2, "eval", str(model), "--data", str(data), "--tasks", "caption-loss", "--out", f"{out}/eval.json"],
        checkout,
    )
    captions = [*ov2, "caption", str(data), "--checkpoint", str(model), "--json"]
    with open(out / "captions.jsonl", "w") as file:
        subprocess.run([sys.executable, *captions], cwd=ROOT, env=environment(checkout), check=True, stdout=file)
    for target in ("hf", "open-clip", "ov2", "timm"):
        run([*ov2, "export", str(model), "--to", target, "--out", str(out / target)], checkout)


def differences(one: Path, other: Path) -> list[str]:
    import torch
    from safetensors.torch import load_file

    found = []
    for name, value in torch.load(one / "features.pt").items():
        if not torch.allclose(value, torch.load(other / "features.pt")[name], rtol=TOLERANCE, atol=1e-5):
            found.append(f"features {name}")
    losses = [json.loads((folder / "eval.json").read_text())["caption-loss"] for folder in (one, other)]
    for name, value in losses[0].items():
        if isinstance(value, float) and abs(value - losses[1][name]) > TOLERANCE * abs(value):
            found.append(f"evaluation: {name} {value}, {losses[1][name]}")
    texts = [
        [[caption["text"] for caption in json.loads(line)["captions"]] for line in text.splitlines()]
        for text in ((folder / "captions.jsonl").read_text() for folder in (one, other))
    ]
    found += ["captions"] if not texts[0] or texts[0] != texts[1] else []
    for file in sorted(one.rglob("*.safetensors")):
        a, b = load_file(file), load_file(other / file.relative_to(one))
        if a.keys() != b.keys() or any(not torch.equal(a[key], b[key]) for key in a):
            found.append(f"export {file.relative_to(one)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a checkout of OpenCLIP")
    checkout = parser.parse_args().path.resolve()
    if not (checkout / "src" / "open_clip").is_dir():
        parser.error(f"{checkout}: no src/open_clip in it")
    names = " or ".join(TRAINING)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({names})", *FILES]
    tests = subprocess.run(pytest, cwd=ROOT, env=environment(checkout), capture_output=True, text=True)
    print(tests.stdout)
    result = next(line for line in reversed(tests.stdout.splitlines()) if " passed" in line or " failed" in line)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        from square_shards import write_square_shards

        data = write_square_shards(folder / "data", 1, 32)[0]
        flags = ["--model", "ov2-vit-nano-8", "--train-data", str(data), "--train-num-samples", "32", "--epochs", "2"]
        flags += ["--batch-size", "8", "--workers", "0", "--force-image-size", "32", "--force-context-length", "12"]
        flags += ["--lr", "1e-3", "--warmup", "1", "--logs", str(folder), "--name", "run"]
        run(["-m", "open_clip_ov2", "train", *flags], None)
        for name, version in (("here", None), ("there", checkout)):
            use(folder / "run", data, folder / name, version)
        differ = differences(folder / "here", folder / "there")
    version = (checkout / "src" / "open_clip" / "version.py").read_text().split("'")[1]
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    same = f"differ: {'; '.join(differ)}" if differ else "as with the installed version"
    print(f"| {version} | {commit.stdout.strip() or '-'} | {result.split(' in ')[0].strip('= ')} | {same} |")
    return int(tests.returncode != 0 or bool(differ))


if __name__ == "__main__":
    sys.exit(main())
