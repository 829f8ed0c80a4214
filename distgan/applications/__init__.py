"""What people do with a trained generator: find pictures in it, repair pictures, walk between images, add to scarce
data, and run it elsewhere.
"""
