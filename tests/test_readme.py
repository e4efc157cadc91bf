"""The commands of the README and of the pages in results/ take options that the scripts have, their links lead
somewhere, and the README's line counts are true."""
import re
import shlex
from importlib import import_module

import pytest
from conftest import ROOT

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("results/**/*.md")))}
README, COMMANDS = PAGES[ROOT / "README.md"], PAGES[ROOT / "results" / "smollm2" / "COMMANDS.md"]
SHORT = dict(re.findall(r"`(\w+)` is `(--[^`]+)`", COMMANDS))  # what some options are called on the pages in results/
SCRIPTS = "search|finetune|eval_ppl|eval_passkey"


def commands(text):
    """(script, arguments) of every command of one of the four scripts, in code blocks and between backticks. The pages
    in results/ leave out python and have `SHORT` words for some options."""
    for code in re.findall(r"`([^`\n]+)`|^    (.+)$|^(python.+)$", text, re.MULTILINE):
        found = rf"(?:^|(?:python|torchrun) (?:[^&]* )?)({SCRIPTS})\.py( [^&]*|$)"
        for script, arguments in re.findall(found, "".join(code)):
            words = arguments.replace("--seed N", "--seed 0").split(" ")
            yield script, " ".join(SHORT.get(word, word) for word in words)


@pytest.mark.parametrize(("script", "arguments"), sorted({c for text in PAGES.values() for c in commands(text)}))
def test_a_command_has_only_options_that_there_are(script, arguments):
    import_module(script).parser().parse_args(shlex.split(arguments, comments=True))


def test_the_commands_are_found():
    text = "`python search.py`, `torchrun x finetune.py --len 4`\n\n    python eval_ppl.py --len 1  # so\n"
    assert list(commands(text)) == [("search", ""), ("finetune", " --len 4"), ("eval_ppl", " --len 1  # so")]
    assert len(set(commands(README))) > 30 and list(commands("`eval_ppl.py --len 1 texts`")) == [
        ("eval_ppl", " --len 1 --doc-tokens 524288 --data books/test")]
    assert len(set(commands(COMMANDS))) > 15 and set(SHORT) == {"few", "texts", "to64", "to128"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_or_a_heading(page):
    headings = [h.lower() for h in re.findall(r"^#+ (.+)$", PAGES[page], re.MULTILINE)]
    headings = {re.sub(r"[^\w -]", "", h).replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not link.startswith("http"):
            assert link[1:] in headings if link[0] == "#" else (page.parent / link).exists(), link


def test_the_table_of_files_has_their_lines():
    rows = re.findall(r"^\| \[(\w+\.py)\].*\| (\d+) \|$", README, re.MULTILINE)
    names = [f"{name}.py" for name in ("longrope", *SCRIPTS.split("|"))]
    assert rows == [(name, str(len((ROOT / name).read_text().splitlines()))) for name in names]
