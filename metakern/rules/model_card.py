"""Model cards of saved rules, the README.md of their folders."""

from __future__ import annotations

from typing import Protocol

#: Marks a card that save_pretrained wrote, and may replace.
MARK = "<!-- written by save_pretrained of metakern, which replaces it -->"


class Described(Protocol):
    """What a card says of a rule."""

    horizon: int | None
    trained_on: str | None

    def described(self) -> str:
        """What the rule is."""


def model_card(rule: Described) -> str:
    """A card that says what the rule is, what it was trained on if that is known, and its limits."""
    name = type(rule).__name__
    trained = "It is not recorded what this rule was meta-trained on."
    limits = (
        "A learned optimizer serves networks like those that it was meta-trained on, and for as many steps. "
        "Beyond them its loss may stall or rise."
    )
    if rule.trained_on is not None:
        trained = f"Meta-trained on {rule.trained_on.rstrip('.')}."
    if rule.horizon is not None:
        trained += f" Its episodes had {rule.horizon} steps."
        limits += f" LearnedOptimizer warns once after step {rule.horizon}."
    else:
        trained += " It is not recorded for how many steps."
    return f"""---
library_name: metakern
tags:
- learned-optimizer
- meta-learning
---
{MARK}

# {name}

{rule.described()}

## Training

{trained}

## Limits

{limits} For other networks tune `lr` as for any optimizer, and let it decay; `digits_lstm` wants 0.03 to 0.3.

## Use

```python
from metakern.optim.learned_optimizer import LearnedOptimizer
from metakern.rules import {name}

rule = {name}.from_pretrained("path/to/this/folder")
optimizer = LearnedOptimizer(model.parameters(), rule)
```
"""
