"""What other libraries give: names and shapes of their files, outputs of their networks. Made by tests/make_*.py."""
