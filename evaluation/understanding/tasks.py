"""The understanding suite of the paper's tables, as lmms-eval 0.7.3 has it: data only.

`evaluation.understanding` knows from these rows how many items and which metric to expect, because the harness gives
a score for half a data set too. docs/evaluate_understanding.md shows the same table; a test compares the two.
"""

from typing import NamedTuple


class Task(NamedTuple):
    """One task of the harness, and what a whole run of it has."""

    benchmark: str
    name: str  # in lmms-eval
    dataset: str  # on the Hub, and the folder under --data
    split: str
    num_items: int
    metric: str  # the number to quote, of the several that the harness reports
    best: int  # its highest possible value
    license: str  # as the authors' repository or Hub card has it; "not stated" where we found nothing
    is_share: bool = False  # the metric is the share of items that are right, so it has an interval
    needs_judge: bool = False


LAB = "lmms-lab-encoder/"
SUITE = (
    Task("VQAv2", "vqav2_val", LAB + "VQAv2", "validation", 214354, "exact_match", 1, "terms of use"),
    Task("GQA", "gqa", LAB + "GQA", "testdev_balanced", 12578, "exact_match", 1, "not stated", is_share=True),
    Task("MMBench", "mmbench_en_dev_static", LAB + "MMBench", "en dev", 4329, "gpt_eval_score", 100, "Apache-2.0"),
    Task(
        "MMBench, judged",
        "mmbench_en_dev",
        LAB + "MMBench",
        "en dev",
        4329,
        "gpt_eval_score",
        100,
        "Apache-2.0",
        needs_judge=True,
    ),
    Task("SEED-Bench", "seedbench", LAB + "SEED-Bench", "test", 17990, "seed_image", 1, "CC BY-NC 4.0"),
    Task("POPE", "pope", LAB + "POPE", "test", 9000, "pope_f1_score", 1, "MIT"),
    Task("MM-Vet", "mmvet", LAB + "MMVet", "test", 218, "gpt_eval_score", 100, "non-commercial", needs_judge=True),
    Task("MME", "mme", LAB + "MME", "test", 2374, "mme_perception_score", 2000, "not stated"),
    Task("MMMU", "mmmu_val", LAB + "MMMU", "validation", 900, "mmmu_acc", 1, "Apache-2.0", is_share=True),
    Task(
        "RealWorldQA", "realworldqa", LAB + "RealWorldQA", "test", 765, "exact_match", 1, "CC BY-ND 4.0", is_share=True
    ),
    Task("TextVQA", "textvqa_val", LAB + "textvqa", "validation", 5000, "exact_match", 1, "not stated"),
    Task("AI2D", "ai2d", LAB + "ai2d", "test", 3088, "exact_match,flexible-extract", 1, "not stated", is_share=True),
    Task("ChartQA", "chartqa", LAB + "ChartQA", "test", 2500, "relaxed_overall", 1, "GPL-3.0", is_share=True),
    Task("DocVQA", "docvqa_val", LAB + "DocVQA", "validation", 5349, "anls", 1, "not stated"),
    Task("InfoVQA", "infovqa_val", LAB + "DocVQA", "validation", 2801, "anls", 1, "not stated"),
    Task(
        "OCRBench", "ocrbench", "echo840/OCRBench", "test", 1000, "ocrbench_accuracy", 1, "not stated", is_share=True
    ),
    Task(
        "MathVista",
        "mathvista_testmini_format",
        "AI4Math/MathVista",
        "testmini",
        1000,
        "llm_as_judge_eval",
        100,
        "CC BY-SA 4.0",
        is_share=True,
        needs_judge=True,
    ),
    Task(
        "ScienceQA",
        "scienceqa_img",
        LAB + "ScienceQA",
        "test",
        2017,
        "exact_match",
        1,
        "CC BY-NC-SA 4.0",
        is_share=True,
    ),
    Task("MMStar", "mmstar", "Lin-Chen/MMStar", "val", 1500, "average", 1, "not stated"),
    Task("MMVP", "mmvp", "lmms-lab-eval/MMVP", "train", 300, "mmvp_pair_accuracy", 1, "MIT"),
    Task(
        "HallusionBench",
        "hallusion_bench_image",
        LAB + "HallusionBench",
        "image",
        951,
        "aAcc",
        100,
        "BSD-3-Clause",
        needs_judge=True,
    ),
    Task("VizWiz", "vizwiz_vqa_val", LAB + "VizWiz-VQA", "val", 4319, "exact_match", 1, "not stated"),
    Task("BLINK", "blink", "BLINK-Benchmark/BLINK", "val", 1901, "blink_acc", 1, "Apache-2.0"),
)
