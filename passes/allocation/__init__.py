"""How many units each group keeps under a budget: what sizes cost, what they damage, and the choice
among them."""
