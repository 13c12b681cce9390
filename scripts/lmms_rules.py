"""Score made answers by our rules and by lmms-eval's functions, in lmms-eval's environment, and ask TextVQA's question
with OCR tokens as both do; all have to agree.

    PYTHONPATH=src ENV/bin/python scripts/lmms_rules.py

ENV is made by `bash scripts/setup_lmms.sh ENV`.
"""

from __future__ import annotations

import random
from collections import Counter

from lmms_eval.tasks.chartqa.utils import chartqa_process_results
from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text, textvqa_process_results

from open_clip_ov2.evaluate.text.question_answering import RULES
from open_clip_ov2.evaluate.text.questions import with_ocr_tokens

WORDS = ("Stop", "the café", "12", "12.5%", "0.125", "$1,000", "no", "don't", "dont", "a dog.", "two", "2", "",
         "U.S.A.",
         "10:30", "red / blue", "x^2 + y", "-5", "1e3", "yes, it is", "100", "104.9", "105.1", "0",
         "none")  # fmt: skip
COUNT = 500


def main() -> None:
    """COUNT answers by each of three rules."""
    rng, differ = random.Random(0), Counter[str]()
    for _ in range(COUNT):
        true = rng.choice([word for word in WORDS if word])
        said = rng.choice([true, true.upper(), true.rstrip("."), f" {true}\n", f"It is {true}.", rng.choice(WORDS)])
        ten = [rng.choice([true, true.lower(), rng.choice(WORDS)]) for _ in range(10)]
        kind = rng.choice(["HME100k", "SVT"])
        pairs = {
            "vqa": (
                RULES["vqa"](said, ten),
                textvqa_process_results({"answers": list(ten), "question_id": 0}, [said])["exact_match"],
            ),
            "relaxed": (
                RULES["relaxed"](said, [true]),
                # Without white space at the ends, which our rule drops and lmms-eval's does not.
                chartqa_process_results({"type": "human_test", "answer": true}, [said.strip()])["relaxed_overall"],
            ),
            "ocrbench": (
                RULES["ocrbench-math" if kind == "HME100k" else "ocrbench"](said, [true]),
                ocrbench_process_results({"dataset": kind, "question_type": "x", "answer": [true]}, [said])[
                    "ocrbench_accuracy"
                ]["score"],
            ),
        }
        for rule, (ours, theirs) in pairs.items():
            if abs(ours - theirs) > 1e-9:
                differ[rule] += 1
                print(f"{rule}: {said!r} for {true!r} or {ten}: ours {ours}, lmms-eval's {theirs}")
    print(f"{COUNT} answers by each rule; different: {dict(differ) or 'none'}")
    question, tokens = "What brand is it?", ["ACME", "12 oz"]
    options = {"pre_prompt": "", "post_prompt": "", "ocr": True}
    pair = with_ocr_tokens(question, tokens), textvqa_doc_to_text({"question": question, "ocr_tokens": tokens}, options)
    print(f"question with OCR tokens: {pair[0]!r}; lmms-eval's is {'equal' if pair[0] == pair[1] else repr(pair[1])}")


if __name__ == "__main__":
    main()
