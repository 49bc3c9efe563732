"""Several processes that train one model: their group, restarts, signs of life, and checks that all must agree on."""
