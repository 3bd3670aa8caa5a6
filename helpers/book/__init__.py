"""What only the book needs: its claims, data, networks, photographs, planted bugs and interactive elements."""

__all__ = [
    "assets",
    "bugs",
    "claims",
    "data",
    "explorer",
    "live_panel",
    "models",
    "photographs",
    "training",
    "training_dynamics",
]
