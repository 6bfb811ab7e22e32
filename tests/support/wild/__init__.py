"""Small segmentation networks in the style of public implementations, written without fastseg in mind."""
