"""Recipes: passes, exports, evaluations and gates as pydantic models, and the plan and estimate of a recipe. No torch here."""
