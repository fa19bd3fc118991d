import datasets

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo"}


def questions(**_):
    names = list(CAPITALS.values())
    return {"test": datasets.Dataset.from_list([
        {"question": f"The capital of {country} is", "choices": [names[(i + 1 + k) % 4] for k in range(3)] + [name], "label": 3}
        for i, (country, name) in enumerate(CAPITALS.items())])}
