"""The experiment of arXiv 2110.14459: meta-training an optimizer on four kinds of networks, in several ways."""
