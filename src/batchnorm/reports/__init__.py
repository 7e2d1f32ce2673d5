"""What every report is made with: pages, files and progress."""
