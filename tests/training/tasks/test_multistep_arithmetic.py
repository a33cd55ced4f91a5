from training.tasks.catalog import get_task


def test_answers_are_what_python_evaluates():
    items = get_task("multistep_arithmetic").generate("train", 400, seed=1)
    for item in items:
        assert item.prompt.endswith(" =")
        assert item.completion == str(eval(item.prompt.removesuffix(" ="), {"__builtins__": {}})), item
