from training.tasks.catalog import get_task


def test_answers_are_what_python_evaluates():
    items = get_task("boolean_expressions").generate("train", 400, seed=1)
    for item in items:
        assert item.prompt.endswith(" is")
        value = eval(item.prompt.removesuffix(" is"), {"__builtins__": {}})
        assert item.completion == str(value), item
