"""Recipes: what to train, on what, with what; the schema, loading, overrides, validation. Nothing heavy is imported.

recipe = load_recipe("finetune/driving", model="tiny", hardware="1gpu", overrides=["stage.steps=100"])
for row in describe(recipe):
    print(row.key, row.value, row.meaning, row.source)
"""

from anyflow.recipe.check import check_files, check_recipe, is_hub_id, lagging_average, parse_shape
from anyflow.recipe.describe import Row, describe
from anyflow.recipe.load import list_recipes, load_recipe, save_recipe, to_dict
from anyflow.recipe.schema import (
    CheckpointRecipe,
    DataRecipe,
    HardwareRecipe,
    LoraRecipe,
    ModelRecipe,
    Recipe,
    RunRecipe,
    SamplingRecipe,
)

__all__ = [
    "CheckpointRecipe",
    "DataRecipe",
    "HardwareRecipe",
    "LoraRecipe",
    "ModelRecipe",
    "Recipe",
    "Row",
    "RunRecipe",
    "SamplingRecipe",
    "check_files",
    "check_recipe",
    "describe",
    "is_hub_id",
    "lagging_average",
    "list_recipes",
    "load_recipe",
    "parse_shape",
    "save_recipe",
    "to_dict",
]
