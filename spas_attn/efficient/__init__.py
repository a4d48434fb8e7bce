"""What EfficientAttention is made of: masks, ways of computing, memory, and the choice between them."""
