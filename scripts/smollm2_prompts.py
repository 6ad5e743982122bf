# ruff: noqa: E501
"""Prompts of ten kinds for a small chat model: what its causal adapter is trained on, and 100 that it never sees.

    python scripts/smollm2_prompts.py GSM8K_TRAIN.jsonl FOLDER

writes `train.jsonl` and `held_out.jsonl`: lines with `id`, `kind` and `messages`. Subjects of held-out prompts stand in no
training prompt; arithmetic is GSM8K's training set (MIT), split the same way.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

SUBJECTS = """volcanoes; the moon; bread; bicycles; the Roman Empire; photosynthesis; black holes; honey bees; coffee; glaciers;
chess; the human heart; rainbows; earthquakes; vaccines; the printing press; penguins; solar panels; the stock market; tea;
rivers; gravity; dinosaurs; the internet; cheese; magnets; sleep; forests; the French Revolution; whales; clouds; batteries;
democracy; chocolate; spiders; the water cycle; airplanes; music; mathematics; the Great Wall of China; DNA; deserts; owls;
submarines; paper; the Olympic Games; inflation; yoga; salt; lightning; trains; the brain; tides; ants; glass; robots;
the Silk Road; pottery; football; the ozone layer; libraries; electricity; whiskey; cats; dogs; horses; gardens; rice; maps;
clocks; bridges; castles; poetry; fractions; probability; algebra; the periodic table; steam engines; telescopes; microscopes;
the Industrial Revolution; World War I; ancient Egypt; the Vikings; Shakespeare; jazz; opera; painting; photography; cinema;
cooking; swimming; hiking; running; tennis; basketball; sailing; skiing; camping; fishing; knitting; woodworking; recycling;
public transport; climate change; renewable energy; artificial intelligence; computer viruses; passwords; databases; compilers;
search engines; smartphones; electric cars; satellites; nuclear power; wind turbines; vitamins; proteins; allergies; stress;
meditation; friendship; leadership; teamwork; time management; public speaking; budgeting; job interviews; learning languages;
teaching children; pets; moving house; travelling alone; remote work; small businesses; online shopping; volunteering;
bees and flowers; coral reefs; mountains; islands; rain; snow; the seasons; stars; comets; Mars; Jupiter; the Sun; bacteria;
fungi; trees; roses; tomatoes; potatoes; apples; lemons; soup; pasta; pizza; salads; pancakes; ice cream; wine; milk; eggs;
markets; money; banks; taxes; insurance; contracts; elections; constitutions; courts; newspapers; radio; television; podcasts;
museums; theatres; festivals; weddings; birthdays; holidays; schools; universities; hospitals; airports; hotels; restaurants;
lighthouses; canals; tunnels; skyscrapers; windmills; wells; fire; ice; iron; gold; silver; copper; diamonds; plastic; cotton;
silk; wool; leather; shoes; hats; umbrellas; mirrors; candles; soap; perfume; toys; puzzles; kites; balloons; drums; guitars;
violins; pianos; flutes; choirs; dancing; ballet; comics; fairy tales; myths; riddles; proverbs; alphabets; grammar; spelling"""
PLACES = """Paris; Tokyo; Brazil; Kenya; Iceland; Canada; Egypt; India; Norway; Peru; Australia; Mexico; Italy; Morocco; Vietnam;
Greece; Scotland; Chile; Turkey; Finland; Portugal; Nepal; Cuba; Ireland; Poland; Spain; Thailand; Austria; Jordan; Sweden"""
PEOPLE = """a baker; a teacher; a young doctor; a retired pilot; a gardener; a taxi driver; a lonely robot; two sisters; a shy boy;
a fisherman; an old librarian; a clever fox; a postman; a tailor; a queen; a student; a nurse; a farmer; a clockmaker; a sailor;
a painter; a violinist; a mountain guide; a lighthouse keeper; a detective; a chef; a cat; a dragon; an astronaut; a plumber"""
THINGS = """a lost key; a strange letter; a storm; a broken clock; a hidden door; a forgotten song; a race; a birthday; an old map;
a promise; a stolen bicycle; a new neighbour; a long journey; a mistake; a secret recipe; a talking bird; a power cut; a wedding;
a flood; a lucky coin; a missing dog; a first day at work; a snowman; a bridge; a festival; a dream; a garden; a train; an exam"""
TASKS = """reverses a string; checks whether a number is prime; computes the factorial of a number; finds the largest number in a list;
counts the vowels in a string; sorts a list of numbers; removes duplicates from a list; checks whether a word is a palindrome;
computes the Fibonacci sequence; converts Celsius to Fahrenheit; finds the sum of a list; counts the words in a text;
merges two sorted lists; finds the second largest number in a list; computes the average of a list; computes a power;
checks whether a year is a leap year; converts a number to binary; finds the common elements of two lists; capitalises every word;
computes the greatest common divisor of two numbers; counts how often each character occurs; rotates a list by n places;
flattens a nested list; checks whether two words are anagrams; computes the median of a list; reads a file line by line;
transposes a matrix; validates an email address; finds the longest word in a sentence; prints a multiplication table;
computes the sum of the digits of a number; performs a binary search; implements a stack; implements a queue; groups words by length;
computes compound interest; converts Roman numerals to integers; generates a random password; removes spaces from a string"""
LANGUAGES = "Python; JavaScript; Java; C; C++; Go; Rust; Ruby; TypeScript; SQL-free Bash"
OCCASIONS = """asking for a day off; thanking them for a gift; complaining about a late delivery; inviting them to a party;
apologising for a missed meeting; asking for a refund; recommending a former colleague; applying for a job; cancelling a subscription;
congratulating them on a promotion; asking about the price of a room; announcing a new opening time; asking for feedback;
reminding them of a deadline; introducing a new team member; saying goodbye after five years; asking for a deadline extension;
reporting a broken heater; confirming an appointment; asking for advice"""
RECIPIENTS = """my manager; a customer; my landlord; an old friend; a hotel; the city council; my teacher; a supplier; my neighbour;
a bookshop; my grandmother; the human resources department; a newspaper; my football team; a conference organiser"""
SENTENCES = """The meeting was moved to Thursday because the manager was ill.; I can't come to the party, my car broke down yesterday.;
The company made a lot of money last year, but it lost many workers.; She was really happy when she saw her dog again.;
The results of the experiment were not what we thought they would be.; You have to send the form before Friday or you will pay more.;
It rained all week, so the river went over its banks and the road was closed.; We think the new phone is good but it costs too much.;
The children didn't want to go home as they had so much fun at the lake.; He said he would call me, but he forgot about it.;
Our train was two hours late and nobody told us why.; The old bridge was built by hand more than three hundred years ago.;
My brother is learning to cook, and last night he burned the rice.; The museum is closed on Mondays and on public holidays.;
Many people in the town are against the plan to build a new airport.; The soup was too salty, so I added some water and potatoes.;
Plants need light, water and air to grow well.; The film was long, but the ending surprised everybody.;
They painted the house blue because green was sold out.; Nobody knew the answer, so the teacher explained it again."""
STYLES = """more formal; friendlier; shorter; simpler, for a child; more polite; in the past tense; as a question; more exciting;
as a newspaper headline; in three different ways; without using the letter z; as a short poem; in the passive voice; more precise"""

ABOUT = {
    "questions": ["What are {0} used for or important for?", "Why do people care about {0}?", "How did {0} begin or develop?",
                  "What should I know about {0}?", "What is the most surprising fact about {0}?"],
    "explanations": ["Explain {0} to a ten-year-old.", "Explain how {0} work or works, step by step.",
                     "Explain the history of {0} in one paragraph.", "Explain the advantages and disadvantages of {0}.",
                     "Explain {0} with an example from daily life."],
    "lists": ["List five facts about {0}.", "Give me ten ideas for a school project about {0}.",
              "List three reasons why {0} matter and explain each.", "Make a list of seven questions to ask an expert on {0}.",
              "Give me a numbered list of tips for beginners about {0}."],
    "dialogue": ["Write a dialogue between a teacher and a student about {0}.", "Write a conversation between two friends who disagree about {0}.",
                 "Write a short interview with an expert on {0}.", "Write a funny dialogue in a shop about {0}."],
}  # fmt: skip


def listed(text: str) -> list[str]:
    """The entries of one of the lists above."""
    return [entry.strip() for entry in text.replace("\n", " ").split(";")]


def chats(rng: random.Random, held_out: bool, questions: list[str]) -> dict[str, list[str]]:
    """Prompts by kind; `questions`: of this side of GSM8K."""

    def some(text: str) -> list[str]:
        entries = listed(text)
        random.Random(1).shuffle(entries)
        cut = max(3, len(entries) // 10)
        return entries[:cut] if held_out else entries[cut:]

    prompts = {
        kind: [t.format(s) for t, s in itertools.product(templates, some(SUBJECTS))]
        for kind, templates in ABOUT.items()
    }
    prompts["questions"] += [
        t.format(p)
        for t, p in itertools.product(
            [
                "What is {0} known for?",
                "What should I see in {0}?",
                "What do people eat in {0}?",
                "When is the best time to visit {0}?",
            ],
            some(PLACES),
        )
    ]
    prompts["letters"] = [
        f"Write {form} to {who}, {why}."
        for form, who, why in itertools.product(["a letter", "a short email"], some(RECIPIENTS), some(OCCASIONS))
    ]
    prompts["stories"] = [
        f"Write a {length} story about {who} and {what}."
        for length, who, what in itertools.product(["short", "funny", "sad"], some(PEOPLE), some(THINGS))
    ]
    prompts["code"] = [
        f"Write a {language} function that {task}."
        for language, task in itertools.product(listed(LANGUAGES)[:9], some(TASKS))
    ]
    prompts["arithmetic"] = questions
    prompts["rewriting"] = [
        f"Rewrite this sentence {how}: {sentence}"
        if how.startswith(("in ", "as ", "without"))
        else f"Make this sentence {how}: {sentence}"
        for how, sentence in itertools.product(listed(STYLES), some(SENTENCES))
    ]
    texts = [" ".join(pair) for pair in itertools.permutations(some(SENTENCES), 2)] + questions
    prompts["summaries"] = [
        f"{how} {text}"
        for how, text in zip(
            itertools.cycle(
                [
                    "Summarise this text in one sentence:",
                    "What is the main point of this text?",
                    "Give this text a title and a two-sentence summary:",
                ]
            ),
            texts,
        )
    ]
    for kind in prompts:
        rng.shuffle(prompts[kind])
    return prompts


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gsm8k", type=Path, help="GSM8K's training set as JSONL")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=480, help="training prompts of a kind")
    parser.add_argument("--held-out", type=int, default=10, help="held-out prompts of a kind")
    given = parser.parse_args()
    questions = [json.loads(line)["question"] for line in given.gsm8k.read_text().splitlines()]
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, held_out, count, own in (
        ("train", False, given.each, questions[200:]), ("held_out", True, given.held_out, questions[:200]),
    ):  # fmt: skip
        rng = random.Random(7)
        lines = [
            {"id": f"{kind}-{number}", "kind": kind, "messages": [{"role": "user", "content": text}]}
            for kind, texts in chats(rng, held_out, list(own)).items() for number, text in enumerate(texts[:count])
        ]  # fmt: skip
        rng.shuffle(lines)
        (given.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{name}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
