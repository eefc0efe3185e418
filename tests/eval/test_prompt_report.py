from am_diffusers.prompts.sets import PromptSet
from evaluating.notes import report_prompts


def test_repetitions_and_overlong_prompts_are_reported():
    texts = ("a fox", "an owl", "A   FOX", "a b c d e", "an owl", "a fox ", "a fox!")
    prompts = PromptSet(texts, {"tag": ("x", "", "x", "y", "", "x", "x")})
    words = (lambda text: len(text.split()), 4)
    report = report_prompts(prompts, {"words": words, "letters": (len, 6)})
    assert report.duplicates == ((0, 2, 5), (1, 4))
    assert report.num_repeated == 3
    assert [found.prompts for found in report.overlong] == [((3, 5),), ((2, 7), (3, 9))]
    assert report.lines() == [
        "prompts: 7, 2 of tag",
        "3 prompts repeat an earlier one and count again: 'a fox' at 0, 2, 5; 'an owl' at 1, 4",
        "1 prompts are cut off at the 4 tokens of words: prompt 3 (5 tokens) 'a b c d e'",
        "2 prompts are cut off at the 6 tokens of letters: prompt 2 (7 tokens) 'A   FOX'; prompt 3 (9 "
        "tokens) 'a b c d e'",
    ]


def test_nothing_to_report_is_one_line():
    report = report_prompts(PromptSet(("a fox", "an owl")), {"letters": (len, 6)})
    assert report.lines() == ["prompts: 2"]


def test_long_texts_and_long_lists_are_shortened():
    texts = tuple(f"{i} " + "x" * 100 for i in range(5))
    line = report_prompts(PromptSet(texts), {"letters": (len, 6)}).lines()[1]
    assert line.endswith("; ...")
    assert line.count("prompt ") == 3
    assert "x" * 78 not in line
