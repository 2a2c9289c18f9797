"""The training loop, the train step and the optimizer. They do not depend on the loss."""
