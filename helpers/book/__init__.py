"""What only the book needs: its claims, data, networks, photographs, planted bugs and interactive elements."""
