"""What the secondary holds of one guest: image, staged epoch, journal, history."""
