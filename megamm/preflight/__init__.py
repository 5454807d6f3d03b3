"""Are these machines fit to train on? Checked by one task a GPU, before training, without trusting any of them."""
