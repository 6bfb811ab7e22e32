"""Max-pooling and max-unpooling."""
