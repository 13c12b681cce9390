"""What a run does, stage by stage, and what that costs. Pure Python: no torch, no OpenCLIP."""

from open_clip_ov2.recipe.counts import short_count
from open_clip_ov2.recipe.recipe_files import dump_recipe, load_recipe
from open_clip_ov2.recipe.stage import Recipe, Stage, parse_stage

__all__ = ["Recipe", "Stage", "dump_recipe", "load_recipe", "parse_stage", "short_count"]
