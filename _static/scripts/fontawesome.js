// Stands in for the theme's file of the same name: 1.5 MB of icons that the theme's web font draws as well.
