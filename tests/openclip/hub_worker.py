"""Run with HF_HUB_OFFLINE=1 and a cache laid out by the test: loads by hub name and writes what came out."""

import sys

import open_clip
import torch

import open_clip_ov2

name, images_file, out_file = sys.argv[1:4]
images = torch.load(images_file)
model, preprocess = open_clip.create_model_from_pretrained(name)
captioner, _, tokenizer = open_clip_ov2.create_caption_model(name)
with torch.no_grad():
    tokens = model.eval().encode_image_tokens(images)
    ids = captioner.generate(images, seq_len=6)
texts = open_clip.get_tokenizer(name)(["a cat"])
evil = ""
try:
    open_clip.create_model(name + "-evil")
except RuntimeError as error:
    evil = str(error)
words = [tokenizer.decode(row) for row in ids.tolist()]
torch.save({"tokens": tokens, "ids": ids, "texts": texts, "words": words, "evil": evil,
            "preprocess": str(preprocess), "kind": type(model).__name__}, out_file)  # fmt: skip
