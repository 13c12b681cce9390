"""Every flag of OpenCLIP 3.3 and of `ov2 train`: the test that shows its effect, or its place among those refused."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from open_clip_train.params import parse_args as open_clip_parse_args

from open_clip_ov2.openclip.command.flags import build_parser
from open_clip_ov2.openclip.command.refusals import ALWAYS, NEEDS, OF_DATA, OTHERS, WITH_OV2, Rule

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "train_flags.md"

# Tests, and the flags whose effect they show. Those that ov2 models refuse are shown with CLIP or CoCa.
SHOWN = {
    "openclip/test_obeyed_flags.py": {
        "test_a_flag_is_seen_in_the_pixels": "image_mean image_std image_interpolation image_resize_mode "
        "force_image_size aug_cfg color_jitter",
        "test_a_flag_chooses_the_samples": "train_data val_data train_num_samples val_num_samples dataset_type "
        "csv_separator csv_img_key csv_caption_key caption_keys",
        "test_resampling_draws_with_replacement_by_the_factors": "dataset_resampled train_data_upsampling_factors",
        "test_the_seed_sets_the_order_and_the_batch_size_the_batches": "seed batch_size",
        "test_each_worker_reads_shards_of_its_own": "workers",
        "test_a_buffer_of_one_keeps_the_order_and_large_pictures_are_left_out": "shuffle_buffer max_image_pixels",
        "test_fast_decoding_takes_another_crop": "decode",
        "test_family_gives_clip_the_pixels_that_the_same_flags_give_an_ov2_model": "augmentation",
    },
    "openclip/test_stock_flags.py": {
        "test_the_optimizer_is_as_asked": "lr beta1 beta2 eps wd wd_exclude opt momentum",
        "test_the_schedule_is_as_asked": "lr_scheduler warmup epochs epochs_cooldown lr_cooldown_end lr_cooldown_power",
        "test_flags_of_ov2_reach_the_model_and_its_loss": "keep_ratio eval_keep_ratio fusion label_smoothing z_loss "
        "global_batch base_lr warmup_samples",
        "test_an_ov2_model_is_as_asked": "force_patch_dropout force_context_length grad_checkpointing precision device",
        "test_a_clip_model_and_its_loss_are_as_asked": "force_custom_text force_quick_gelu siglip loss_dist_impl "
        "local_loss gather_with_grad torchscript",
        "test_towers_are_locked_as_asked": "lock_image lock_image_unlocked_groups lock_image_freeze_bn_stats lock_text "
        "lock_text_unlocked_layers lock_text_freeze_layer_norm",
        "test_weights_come_from_a_file_and_a_cache": "pretrained pretrained_image cache_dir tokenizer",
        "test_a_teacher_is_distilled_and_the_student_saved": "distill_model distill_pretrained",
    },
    "openclip/test_stock_runs.py": {
        "test_steps_records_and_checkpoints_are_as_asked": "grad_clip_norm skip_scheduler log_every_n_steps "
        "save_frequency val_frequency debug coca_caption_loss_weight logs name save_every_steps keep_checkpoints",
        "test_accumulated_batches_are_one_batch": "accum_freq",
        "test_moments_are_carried_and_checkpoints_written_by_the_clock": "carry_optimizer save_every_minutes stage",
        "test_wandb_gets_project_and_notes": "report_to wandb_project_name wandb_notes",
        "test_two_processes_are_connected_as_asked": "dist_url dist_backend ddp_static_graph log_local "
        "no_set_device_rank use_bn_sync",
    },
    "openclip/test_run_flags.py": {
        "test_save_most_recent_and_delete_previous_checkpoint": "save_most_recent delete_previous_checkpoint",
        "test_copy_codebase": "copy_codebase",
        "test_resume_from_a_file_is_the_run_from_there_on": "resume",
        "test_remote_sync_keeps_a_copy_from_which_an_empty_machine_resumes": "remote_sync remote_sync_frequency "
        "remote_sync_protocol",
        "test_imagenet_val_and_v2_of_an_ov2_model_go_by_likelihood": "imagenet_val imagenet_v2 zeroshot_frequency",
    },
    "openclip/test_train.py": {
        "test_baselines_run_through_the_stock_step": "model",
        "test_compiled_blocks_give_the_same_run": "torchcompile",
        "test_coca_without_contrast_survives_ddp": "coca_contrastive_loss_weight gradient_reduction",
        "test_the_memory_budget_reaches_the_blocks": "activation_memory_budget",
        "test_tensorboard_shows_the_panels": "sample_captions",
    },
    "openclip/test_training_aids.py": {
        "test_averages_follow_their_equation_and_resume_bit_for_bit": "ema_decay",
        "test_adapters_are_merged_and_the_rest_of_the_tower_stays": "lora_rank lora_alpha freeze",
        "test_rates_and_frozen_parts_of_a_run": "lr_layer_decay",
        "test_a_step_of_tokens_is_the_step_of_its_batches": "tokens_per_step",
    },
    "openclip/test_prompt_keys.py": {"test_a_run_with_prompts": "prompt_keys"},
    "openclip/test_caption_sets.py": {
        "test_training_from_sidecars_is_training_from_json_fields": "captions val_captions"
    },
    "openclip/test_fsdp.py": {
        "test_it_is_the_same_training_as_ddp": "fsdp recompute_elementwise",
        "test_sharded_checkpoints_resume_on_any_number_of_processes": "fsdp_hybrid fsdp_checkpoint",
    },
    "openclip/test_float8.py": {"test_a_run_in_float8_is_near_the_run_in_bfloat16": "fp8"},
    "openclip/test_native_aspect.py": {"test_a_resumed_run_is_the_run": "aspect max_tokens"},
    "openclip/test_eval.py": {"test_tasks_have_their_own_interval": "eval eval_every_samples val_every_samples"},
    "openclip/test_resume.py": {
        "test_a_recipes_train_table_reaches_the_runs_own_options": "recipe",
        "test_a_finished_run_says_so_and_a_changed_one_is_refused": "until_stage override",
        "test_non_finite_steps_are_left_out_and_then_end_the_run": "max_bad_steps",
        "test_a_stalled_shard_is_named": "stall_warning",
        "test_elastic_runs_go_on_alike_with_other_numbers": "elastic",
    },
}

# Of ours, what acts on a GPU alone: docs/performance.md has the figures.
ON_A_GPU = {"attention_kernel", "compile_encoder"}


@functools.cache
def definitions(file: str) -> dict[str, ast.AST]:
    """What a test file defines at its top level, by name."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse((TESTS / file).read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        for target in (one for each in targets for one in getattr(each, "elts", [each])):
            found[getattr(target, "name", None) or getattr(target, "id", "")] = node
    return found


def source(file: str, test: str) -> str:
    """Of a test, with all of its file that it uses, fixtures and tables of parameters too."""
    known, todo, seen = definitions(file), [test], set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            nodes = list(ast.walk(known[name]))
            used = {getattr(node, "id", None) or getattr(node, "arg", None) for node in nodes}
            todo += sorted(used & known.keys())
    return "\n".join(ast.unparse(known[name]) for name in sorted(seen))


def rows() -> Iterator[tuple[str, str, str]]:
    for file, tests in SHOWN.items():
        for test, flags in tests.items():
            for flag in flags.split():
                yield file, test, flag


def names(rule: Rule) -> list[str]:
    """Of its flags, as argparse has them."""
    return [flag.split()[0].removeprefix("--").replace("-", "_") for flag in rule.flags.split(", ")]


def test_every_flag_has_a_test_or_is_refused() -> None:
    """Oracle: both parsers. What only ov2 models refuse has a test too, with another model."""
    theirs = set(vars(open_clip_parse_args([])))
    ours = {action.dest for action in build_parser()._actions}
    shown = [flag for _, _, flag in rows()]
    assert len(shown) == len(set(shown))
    refused, with_ov2 = ({name for rule in rules for name in names(rule)} for rules in (ALWAYS, WITH_OV2))
    assert not set(shown) & refused
    assert set(shown) | refused | ON_A_GPU == theirs | ours
    assert not set(shown) & ON_A_GPU
    assert theirs >= with_ov2
    assert all(set(names(rule)) <= theirs | ours for rule in (*OTHERS, *OF_DATA, *NEEDS))


@pytest.mark.parametrize(("file", "test"), [(file, test) for file, tests in SHOWN.items() for test in tests])
def test_a_test_names_the_flags_that_it_shows(file: str, test: str) -> None:
    text = source(file, test)
    for flag in SHOWN[file][test].split():
        word = rf"{flag}(?![\w-])" if "_" in flag else rf"{flag}="
        assert re.search(rf"(?<![\w-])({word}|--{flag.replace('_', '-')}(?![\w-]))", text), flag


def test_the_page_of_flags_says_which_are_refused() -> None:
    """Oracle: the rules that refuse them, of OpenCLIP's flags."""
    lines, theirs = PAGE.read_text().splitlines(), vars(open_clip_parse_args([]))
    for rule in (*ALWAYS, *WITH_OV2, *(rule for rule in (*OTHERS, *OF_DATA, *NEEDS) if "{model}" not in rule.where)):
        for flag in theirs.keys() & set(names(rule)):
            (line,) = [line for line in lines if re.match(rf"\| (`|<code>)--{flag.replace('_', '-')}[ `<]", line)]
            assert f"**Refused{rule.where.format(model='ov2 models')}**: {rule.why}" in line
