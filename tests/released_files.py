"""Folders in the exact layout of the released checkpoints, at reduced size, and their encoder computed plainly."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

# Reduced widths that keep what is peculiar to each: reference.md, encoder variants. (width, layers, head width, mlp).
SHAPES = {
    "l": (64, 3, 16, 256),
    "h": (160, 2, 80, 640),  # head width 80
    "so400m": (144, 2, 72, 538),  # mlp 4304/1152, as the ratio 3.7362 that the released config says
    "g": (176, 2, 88, 768),  # 16 heads of 88 and mlp 6144/1408
}
RATIOS = {"so400m": 3.7362, "g": 6144 / 1408}
PATCH = 14


def encoder_state(size: str, image_size: int = 56, seed: int = 0, output_width: int | None = None) -> dict[str, Tensor]:
    """Released keys, bare; 12 a block and six besides, so 294 for the 24 blocks of L/14."""
    width, layers, _, mlp = SHAPES[size]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0, std: float = 0.1) -> Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    state = {
        "class_embedding": normal(width),
        "positional_embedding": plain_table(image_size // PATCH, width),
        "conv1.weight": normal(width, 3, PATCH, PATCH, std=0.03),
        "ln_post.weight": normal(width, mean=1.0),
        "ln_post.bias": normal(width),
        "proj": normal(width, output_width or width),
    }
    for index in range(layers):
        block = f"transformer.resblocks.{index}."
        for norm in ("ln_1", "ln_2"):
            state |= {f"{block}{norm}.weight": normal(width, mean=1.0), f"{block}{norm}.bias": normal(width)}
        state |= {
            f"{block}attn.in_proj_weight": normal(3 * width, width),
            f"{block}attn.in_proj_bias": normal(3 * width),
            f"{block}attn.out_proj.weight": normal(width, width),
            f"{block}attn.out_proj.bias": normal(width),
            f"{block}mlp.c_fc.weight": normal(mlp, width),
            f"{block}mlp.c_fc.bias": normal(mlp),
            f"{block}mlp.c_proj.weight": normal(width, mlp, std=0.05),
            f"{block}mlp.c_proj.bias": normal(width),
        }
    return state


def plain_table(side: int, width: int) -> Tensor:
    """docs/reference.md, "positions", one number at a time."""
    quarter = width // 4
    rows = [[0.0] * width]
    for y in range(side):
        for x in range(side):
            omega = [10_000.0 ** -(k / (quarter - 1)) for k in range(quarter)]
            angles_x, angles_y = torch.tensor([x * o for o in omega]), torch.tensor([y * o for o in omega])
            rows.append(torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()]).tolist())
    return torch.tensor(rows)


def config(size: str, image_size: int = 56) -> dict:
    width, layers, head_width, _ = SHAPES[size]
    vision = {
        "layers": layers, "width": width, "patch_size": PATCH, "image_size": image_size, "head_width": head_width,
        "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "output_tokens": True,
        "norm_kwargs": {"eps": 1e-6},
    }  # fmt: skip
    if size in RATIOS:
        vision["mlp_ratio"] = RATIOS[size]
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    return {"model_cfg": {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}}


def write_released(folder: Path, size: str, image_size: int = 56) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    state = encoder_state(size, image_size)
    (folder / "open_clip_config.json").write_text(json.dumps(config(size, image_size)))
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return state


def plain_encoder(state: dict[str, Tensor], head_width: int, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """(all tokens after each block, class token first; pooled output). Matrix products, softmax and erf alone."""
    width = len(state["class_embedding"])
    batch, side = len(images), images.shape[-1] // PATCH
    patches = images.reshape(batch, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(batch, side**2, -1)
    x = patches @ state["conv1.weight"].reshape(width, -1).T
    x = torch.cat([state["class_embedding"].expand(batch, 1, -1), x], dim=1) + state["positional_embedding"]
    after = []
    for index in range(sum(name.endswith("ln_1.weight") for name in state)):
        block = {
            name.removeprefix(f"transformer.resblocks.{index}."): value
            for name, value in state.items()
            if name.startswith(f"transformer.resblocks.{index}.")
        }
        x = x + _attention(block, _norm(block, "ln_1", x), head_width)
        hidden = _norm(block, "ln_2", x) @ block["mlp.c_fc.weight"].T + block["mlp.c_fc.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ block["mlp.c_proj.weight"].T + block["mlp.c_proj.bias"]
        after.append(x)
    return after, _norm(state, "ln_post", x[:, 1:].mean(dim=1)) @ state["proj"]


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def _attention(block: dict[str, Tensor], x: Tensor, head_width: int) -> Tensor:
    qkv = x @ block["attn.in_proj_weight"].T + block["attn.in_proj_bias"]
    out = []
    for q, k, v in zip(*(part.split(head_width, dim=-1) for part in qkv.chunk(3, dim=-1)), strict=True):
        out.append((q @ k.transpose(1, 2) / head_width**0.5).softmax(-1) @ v)
    return torch.cat(out, dim=-1) @ block["attn.out_proj.weight"].T + block["attn.out_proj.bias"]


def write_decoder(folder: Path, size: str, width: int = 32, layers: int = 2, heads: int = 4, seed: int = 5) -> dict:
    """caption_decoder.safetensors, its config and a vocabulary of 40 words, beside a released encoder."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    words = ["[PAD]", "[bos]", "[eos]", "[UNK]", *(f"word{index}" for index in range(36))]
    shapes = {
        "token_embedding.weight": (len(words), width),
        "image_projection.weight": (width, SHAPES[size][0]),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "lm_head.weight": (len(words), width),
    }
    for index in range(layers):
        block = f"blocks.{index}."
        shapes |= {f"{block}{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            f"{block}attn.out_proj.weight": (width, width),
            f"{block}attn.out_proj.bias": (width,),
            f"{block}mlp.c_fc.weight": (4 * width, width),
            f"{block}mlp.c_fc.bias": (4 * width,),
            f"{block}mlp.c_proj.weight": (width, 4 * width),
            f"{block}mlp.c_proj.bias": (width,),
        }
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    about = {
        "architecture": "OpenVision2TextDecoder", "fusion_style": "concat", "width": width, "depth": layers,
        "num_heads": heads, "mlp_dim": 4 * width, "vocab_size": len(words), "vision_width": SHAPES[size][0],
        "pad_id": 0, "bos_id": 1, "eos_id": 2, "tokenizer": "bert wordpiece (bert_base_vocab_bos_eos.txt), lowercase",
    }  # fmt: skip
    save_file(state, str(folder / "caption_decoder.safetensors"))
    (folder / "text_decoder_config.json").write_text(json.dumps(about))
    (folder / "bert_base_vocab_bos_eos.txt").write_text("\n".join(words) + "\n")
    return state


def plain_next_logits(state: dict, tokens: Tensor, ids: Tensor, heads: int = 4) -> Tensor:
    """Logits of the next word, `(B, V)`: prefix LM over [image ; text], tanh GELU, no text positions."""
    x = torch.cat([tokens @ state["image_projection.weight"].T, state["token_embedding.weight"][ids]], dim=1)
    length, prefix = x.shape[1], tokens.shape[1]
    hidden = torch.ones(length, length).triu(1).bool()  # later positions,
    hidden[:, :prefix] = False  # but never the image
    width = x.shape[-1]
    for index in range(sum(name.endswith("ln_1.weight") for name in state)):
        block = {n.removeprefix(f"blocks.{index}."): v for n, v in state.items() if n.startswith(f"blocks.{index}.")}
        normed = _norm(block, "ln_1", x)
        qkv = normed @ block["attn.in_proj_weight"].T + block["attn.in_proj_bias"]
        out = []
        for q, k, v in zip(*(part.split(width // heads, dim=-1) for part in qkv.chunk(3, dim=-1)), strict=True):
            scores = (q @ k.transpose(1, 2) / (width / heads) ** 0.5).masked_fill(hidden, -torch.inf)
            out.append(scores.softmax(-1) @ v)
        x = x + torch.cat(out, dim=-1) @ block["attn.out_proj.weight"].T + block["attn.out_proj.bias"]
        inner = _norm(block, "ln_2", x) @ block["mlp.c_fc.weight"].T + block["mlp.c_fc.bias"]
        inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        x = x + inner @ block["mlp.c_proj.weight"].T + block["mlp.c_proj.bias"]
    return _norm(state, "ln_final", x[:, -1]) @ state["lm_head.weight"].T
