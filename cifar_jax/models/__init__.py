"""Networks as functions of their variables: ResNet, its folded form for inference, heads, preprocessing."""
