"""Work whose answers repeat what stands in the prompt, and a conversation that does not: for `bench speculative`."""

from __future__ import annotations

_ARTICLE = """The harbour at Little Wenham was rebuilt twice in the last century. "We did it with our own hands," said \
Margaret Oldfield, who was nine when the first wall gave way. "My father carried stones for eleven weeks and never \
asked for a penny." The second wall, finished in 1962, cost four thousand pounds and was paid for by the county. \
Engineers now say that it will not last another winter. "The footings are gone on the north side," said Peter Hale of \
the harbour commission. "You can put your arm through it at low tide." The commission meets on Thursday to decide \
between a repair, which would last about ten years, and a new wall further out. "Ten years is nothing," said Oldfield. \
"We will be standing here again before the paint is dry." """

_CODE = """class Inventory:
    def __init__(self, items):
        self.items = items

    def total_price(self):
        total = 0
        for item in self.items:
            total += item.price * item.quantity
        return total

    def most_expensive(self):
        best = None
        for item in self.items:
            if best is None or item.price > best.price:
                best = item
        return best

    def names(self):
        result = []
        for item in self.items:
            result.append(item.name)
        return result
"""

_RECORDS = """[
  {"id": 101, "name": "Ada Winter", "email": "ada@example.org", "city": "Leeds", "active": true},
  {"id": 102, "name": "Ben Osei", "email": "ben@example.org", "city": "Hull", "active": false},
  {"id": 103, "name": "Cleo Marsh", "email": "cleo@example.org", "city": "York", "active": true},
  {"id": 104, "name": "Dan Ferro", "email": "dan@example.org", "city": "Leeds", "active": true}
]"""

WORKLOADS: dict[str, tuple[str, ...]] = {
    "summary": (
        f"{_ARTICLE}\n\nSummarize the article. Quote every speaker in full.",
        f"{_ARTICLE}\n\nList each quotation of the article with its speaker, word for word.",
    ),
    "code edit": (
        f"{_CODE}\nRename the class to Stock and repeat the whole file.",
        f"{_CODE}\nRepeat this file and add a docstring to every method.",
    ),
    "json": (
        f'{_RECORDS}\n\nRepeat this JSON with the city of every record set to "London".',
        f'{_RECORDS}\n\nWrite the same JSON again, with a field "country" added to each record.',
    ),
    "chat": (
        "Tell me about the history of tea in a few paragraphs.",
        "I have two free days in a city that I do not know. How should I spend them?",
    ),
}
