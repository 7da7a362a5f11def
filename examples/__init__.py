"""Extensions of fdl as a user writes them: each file is complete and has a recipe beside it; see docs/extending.md."""
