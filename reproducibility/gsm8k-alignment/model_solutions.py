"""GSM8K's example_model_solutions.jsonl as rows of branches: one offline branch for each model."""

from post_training.data.transforms import register_transform


@register_transform("model_solutions")
def model_solutions(row):
    branches = [
        {
            "messages": [{"role": "assistant", "content": found["solution"]}],
            "is_reference_completion": False,
            "metadata": {"model": name},
        }
        for name, found in row.items()
        if isinstance(found, dict) and found["solution"].strip()
    ]
    return {
        "initial_prompt": {"role": "user", "content": row["question"]},
        "original_metadata": {"answer": row["ground_truth"]},
        "conversation_branches": branches,
    }
