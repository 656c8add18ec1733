"""What a person can ask for: passes, exports, evaluations and gates as pydantic models, with a plan and an estimate. No torch."""
