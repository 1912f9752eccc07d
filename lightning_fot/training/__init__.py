"""The LightningModule, its loss, its parameters, its run folder and checkpoints."""
