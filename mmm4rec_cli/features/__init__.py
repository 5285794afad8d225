"""From texts and pictures to one vector an item and modality."""
