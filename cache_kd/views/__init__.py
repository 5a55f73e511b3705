"""Views: seeds, the recipe of augmentation, the schedule of views."""
